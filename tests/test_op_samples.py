"""torch's own samples of the operators that canonicalisation, functionalisation and recognition touch.

The samples are those of PyTorch's operator tests (`op_db`, a private module: read by this test alone).
Each gives through capture and the whole pipeline what eager gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from graphopt.capture import capture
from graphopt.defaults import context, pipeline
from graphopt.errors import CaptureRefused
from tests.tolerances import close

SAMPLES = 5  # an operator, spread over all that there are
SEED = 42  # with which torch's wrappers run what is random: not a part of the graph
DTYPES = (torch.float32, torch.bfloat16)
# Refused as a whole: sizes that a tensor's numbers decide, and that a write changes.
KNOWN = ("DataDependentOutputException", "DynamicOutputShapeException", "changes a tensor's sizes or storage")
# By what of ours reads them.
TOUCHED = {
    "views": (
        "view", "reshape", "permute", "transpose", "t", "movedim", "swapaxes", "unsqueeze", "squeeze",
        "expand", "flatten", "unflatten", "narrow", "select", "split", "chunk", "unbind", "diagonal",
        "contiguous", "mT", "broadcast_to", "expand_as", "view_as", "reshape_as", "unfold", "tensor_split",
        "split_with_sizes",
    ),
    "spellings": (
        "pow", "square", "rsqrt", "sqrt", "reciprocal", "true_divide", "div", "mul", "add", "sub", "rsub",
        "neg", "logical_and", "logical_or", "logical_not", "logical_xor", "eq", "ne", "lt", "le", "gt",
        "ge", "mean", "sum", "var", "where", "masked_fill", "clone", "to", "float", "half", "bfloat16",
        "double", "type_as", "cat", "stack", "repeat", "repeat_interleave", "roll", "flip", "tril", "triu",
        "clamp", "maximum", "minimum", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros",
        "arange", "einsum", "addmm", "baddbmm", "bmm", "matmul", "mm", "__rmatmul__", "__radd__",
        "__rsub__", "__rmul__", "__rdiv__",
    ),
    "writes": (
        "index_copy", "index_add", "index_fill", "index_put", "scatter", "scatter_add", "masked_scatter",
        "select_scatter", "slice_scatter", "diagonal_scatter", "fill", "put", "__getitem__", "gather",
        "index_select", "take_along_dim",
    ),
    "recognised": (
        "nn.functional.scaled_dot_product_attention", "nn.functional.layer_norm", "nn.functional.rms_norm",
        "nn.functional.gelu", "nn.functional.silu", "nn.functional.relu", "nn.functional.linear", "softmax",
        "log_softmax", "sigmoid", "tanh", "erf", "nn.functional.embedding", "nn.functional.group_norm",
        "nn.functional.softplus", "nn.functional.hardswish", "nn.functional.mish", "nn.functional.pad",
    ),
}  # fmt: skip
NAMES = tuple(itertools.chain(*TOUCHED.values()))
OPS = [op for op in op_db if op.name in NAMES]


def test_the_operators_are_there() -> None:
    missing = sorted(set(NAMES) - {op.name for op in OPS})
    assert len(missing) <= 3, f"this torch has no samples of {missing}"


def samples(op: object, dtype: torch.dtype) -> Iterator[tuple[object, tuple[object, ...], dict[str, object]]]:
    """Input, arguments and keywords: some of the first and some of the last."""
    found = list(op.sample_inputs("cpu", dtype, requires_grad=False))  # type: ignore[attr-defined]  # an OpInfo
    step = max(len(found) // SAMPLES, 1)
    for sample in found[::step][:SAMPLES]:
        yield sample.input, sample.args, sample.kwargs


def named(op: object) -> str:
    return ".".join(filter(None, (op.name, op.variant_test_name)))  # type: ignore[attr-defined]


def on_a_view(write: Callable[..., object]) -> Callable[..., Tensor]:
    """The write into the first half of a tensor, which is given as a whole afterwards."""

    def written(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        whole = torch.cat([x, x])
        write(whole[: x.shape[0]], *args, **kwargs)
        return whole

    return written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=named)
@pytest.mark.filterwarnings("ignore")
def test_samples(op: object, dtype: torch.dtype) -> None:
    if dtype in op.dtypes:  # type: ignore[attr-defined]
        assert compared(op, op.op, dtype)  # type: ignore[attr-defined]


@pytest.mark.parametrize("op", [op for op in OPS if op.inplace_variant], ids=named)
@pytest.mark.filterwarnings("ignore")
def test_samples_in_place(op: object) -> None:
    assert compared(op, on_a_view(op.inplace_variant), torch.float32)  # type: ignore[attr-defined]


def compared(op: object, call: Callable[..., object], dtype: torch.dtype) -> int:
    """How many samples ran; those that eager refuses are none."""
    count = 0
    for i, (first, args, kwargs) in enumerate(samples(op, dtype)):
        leaves, spec = pytree.tree_flatten((first, args, kwargs))
        places = [j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[j] for j in places]

        def program(
            *given: Tensor, leaves: list = leaves, spec: object = spec, places: list = places
        ) -> object:
            mine = list(leaves)
            for j, x in zip(places, given, strict=True):
                mine[j] = x
            x, more, keywords = pytree.tree_unflatten(mine, spec)
            return call(x, *more, **keywords)

        where = f"sample {i}: {[tuple(t.shape) for t in tensors]}, {args}, {kwargs}"
        with torch.no_grad():
            try:
                eager = program(*(t.clone() for t in tensors))
            except (RuntimeError, IndexError, ValueError):
                continue  # in place: of another shape or dtype than the result
            count += 1
            try:
                compiled, _ = pipeline().run(capture(program, *tensors), context())
            except CaptureRefused as refusal:
                assert any(word in refusal.reason for word in KNOWN), f"{where}: {refusal}"
                continue
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                ours = compiled(*(t.clone() for t in tensors))
        same(eager, ours, dtype, where)
    return count


def same(eager: object, ours: object, dtype: torch.dtype, where: str) -> None:
    """Structure, shapes and dtypes exactly, values as closely as two runs in that dtype."""
    wants, haves = pytree.tree_leaves(eager), pytree.tree_leaves(ours)
    assert len(wants) == len(haves), where
    for want, have in zip(wants, haves, strict=True):
        if not isinstance(want, Tensor):
            assert want == have, where
            continue
        assert (want.shape, want.dtype) == (have.shape, have.dtype), where
        try:
            close(have, want, dtype) if want.is_floating_point() else torch.testing.assert_close(have, want)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
