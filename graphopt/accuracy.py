"""The accuracy rule, and the fp64 oracle it measures against: the captured graph with its casts raised."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from graphopt import graph
from graphopt.torch_private import OpOverload

# The one table of tolerances, per dtype of the run; the rule adds a tenth of it. The values are those of
# PyTorch's compiler benchmarks: one unit in the last place of half precision, more of the others.
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
)
HALF = frozenset({torch.float16, torch.bfloat16})
FEW_ELEMENTS = 1000  # below, one unlucky element moves the mean: the rule allows a factor of 3

_LOWER = HALF | {torch.float32}
_LOWER_COMPLEX = frozenset({torch.complex32, torch.complex64})
# What a mask adds, in any lower dtype -> the same in fp64 (-3.4e38 is an ordinary number there).
_EXTREMES = {torch.finfo(d).min: torch.finfo(torch.float64).min for d in _LOWER} | {
    torch.finfo(d).max: torch.finfo(torch.float64).max for d in _LOWER
}
_PROVENANCE = ("module_path", "source", "stack_trace", "nn_module_stack")
# Arguments that choose and do not compute: an integer or boolean tensor there stays what it is.
_CHOOSING = frozenset({"condition", "mask", "index", "indices"})


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one run; the numbers are those of the tensor nearest to its limit.

    Attributes:
        ok: whether every tensor keeps the rule.
        rmse_ours: root mean square error against the oracle.
        rmse_eager: eager's error on the same tensor.
        limit: what the rule allows for `rmse_ours`.
        where: path of that tensor in the outputs, as `logits[0]`.
        reason: why it is not ok, None where it is.
    """

    ok: bool
    rmse_ours: float
    rmse_eager: float
    limit: float
    where: str = ""
    reason: str | None = None


def judge(oracle: object, eager: object, ours: object, dtype: torch.dtype) -> Verdict:
    """rmse(fp64, ours) <= m * rmse(fp64, eager) + tol/10, for each tensor of nested outputs.

    m is 2, and 3 for half precision or fewer than 1000 elements. Tensors that are not floating point must be
    equal; infinities and nans must stand where eager has them. Source: `same` in torch/_dynamo/utils.py, the
    accuracy check of PyTorch's compiler benchmarks.

    Args:
        oracle: the outputs in fp64 (`raise_to_fp64`); tensors, numbers, None in lists, tuples and mappings.
        eager: the outputs of the unmodified program, same structure.
        ours: the outputs that are judged, same structure.
        dtype: the dtype the program ran in.

    Raises:
        ValueError: the oracle is not fp64, or no tolerance is known for `dtype`.
        TypeError: an output is of a kind that cannot be compared.
    """
    if dtype not in TOLERANCE:
        raise ValueError(f"no tolerance for {dtype}; known are {', '.join(map(str, TOLERANCE))}")
    expected, reference, found = dict(_leaves(oracle)), dict(_leaves(eager)), dict(_leaves(ours))
    if reference.keys() != found.keys() or expected.keys() != found.keys():
        odd = sorted((reference.keys() ^ found.keys()) | (expected.keys() ^ found.keys()))
        return _refused(odd[0], "is not in all of oracle, eager and ours")
    verdicts = [_judge_one(where, expected[where], reference[where], found[where], dtype) for where in found]
    return max(verdicts, key=_badness, default=Verdict(True, 0.0, 0.0, 0.0))


def rmse(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Root mean square difference of two tensors of one shape, in fp64; 0 for empty tensors."""
    if not expected.numel():
        return 0.0
    return float((expected.double() - found.double()).square().mean().sqrt())


def raise_to_fp64(gm: fx.GraphModule, late: Collection[fx.Node] = ()) -> fx.GraphModule:
    """to(x, bf16) -> to(x, fp64), for every cast, factory, softmax and mask constant of an ATen graph.

    The result is called like `gm`; each call converts floating-point inputs and constants (weights too) to
    fp64, and clones the rest, so that inputs the graph mutates stay as they were. An input passed twice stays
    one tensor; two views of one storage do not. `model.double()` is no oracle: norms and rope cast to fp32.

    Args:
        late: inputs that are never written, which are converted for each call that reads them: weights, of
            which one at a time is then held in fp64.

    Raises:
        ValueError: the graph reinterprets bits or holds a submodule, which has no meaning in fp64.
    """
    raised = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants: dict[object, fx.Node] = {}
    for node in graph.placeholders(gm.graph):
        env[node] = raised.node_copy(node)
    given = {node: env[node] for node in env if node in late}
    early = [node for node in env if node not in given]
    twins = raised.call_function(_twins, tuple(env[node] for node in early))
    for i, node in enumerate(early):
        env[node] = raised.call_function(operator.getitem, (twins, i))
    for node in gm.graph.nodes:
        for read in node.all_input_nodes:
            if read in given:
                env[read] = raised.call_function(_twin, (given[read],))
        if node.op == "get_attr" and node.target not in constants:
            constants[node.target] = raised.call_function(_twin, (raised.node_copy(node),))
        if node.op == "get_attr":
            env[node] = constants[node.target]
        elif node.op == "call_function" and not _sets_grad_mode(node):
            env[node] = _raise_call(raised, node, env)
        elif node.op == "output":
            raised.node_copy(node, env.__getitem__)
        elif node.op in ("call_method", "call_module"):
            raise ValueError(f"{node.op} {node.target} is no ATen call; capture the program first")
    for node in raised.nodes:  # the abstract values say fp32 where the value is fp64
        node.meta = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
    return fx.GraphModule(gm, raised, "RaisedToFp64")


# ---------------------------------------------------------------------------------------------- raising


def _raise_call(raised: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """One call in fp64: dtypes and extreme literals raised, integers that become floats cast first."""
    if node.target is torch.ops.aten.view.dtype:
        raise ValueError(f"{node.name} reinterprets bits ({node.target}); it has no fp64 form")
    new = raised.node_copy(node, env.__getitem__)
    new.target = _SPELT_OUT.get(node.target, node.target)
    new.args = fx.node.map_aggregate(new.args, _raise_literal)
    new.kwargs = fx.node.map_aggregate(new.kwargs, _raise_literal)
    if node.target is torch.ops.aten.rms_norm.default and graph.arg(node, "eps") is None:
        x = graph.arg(node, "input")
        assert isinstance(x, fx.Node)
        weight = new.kwargs.get("weight", new.args[2] if len(new.args) > 2 else None)
        new.args = (*new.args[:2], weight, graph.rms_norm_eps(graph.dtype(x)))  # fp64 has another
        new.kwargs = {}
    if not _makes_floats_of_none(node):
        return new
    if node.target is torch.ops.aten.where.Scalar:  # its literals become fp32, which overflows
        _widen_choice(raised, node, new)
        return new
    if graph.is_factory(node.target) and "dtype" in graph.argument_names(node.target):
        new.kwargs = {**new.kwargs, "dtype": torch.float64}  # zeros([2]): the default dtype is fp32
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
        _cast_integers(raised, node, new)
    return raised.call_function(torch.ops.aten.to.dtype, (new, torch.float64))


def grouped_product(
    rows: torch.Tensor,
    weights: torch.Tensor,
    ends: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """rows[end of g-1 : end of g] @ weights[g], for each group g: aten._grouped_mm in any dtype.

    Args:
        rows: [M, K], in the groups' order; rows after the last end become 0.
        weights: [groups, K, N].
        ends: int32 [groups], where each group's rows end.

    Raises:
        ValueError: another form of the product: its operands' shapes are in the message.
    """
    if rows.dim() != 2 or weights.dim() != 3 or ends is None or bias is not None:
        shapes = f"{list(rows.shape)} and {list(weights.shape)}"
        raise ValueError(
            f"a grouped product of {shapes} is not known here; rows [M, K], weights [groups, K, N]"
        )
    product = rows.new_zeros(rows.shape[0], weights.shape[2])
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        product[start:end] = rows[start:end] @ weight
        start = end
    return product if out_dtype is None else product.to(out_dtype)


# Operators without an fp64 kernel -> the same as plain products.
_SPELT_OUT: Mapping[object, Callable[..., torch.Tensor]] = MappingProxyType(
    {torch.ops.aten._grouped_mm.default: grouped_product}
)


def _makes_floats_of_none(node: fx.Node) -> bool:
    """Whether a call reads no float and gives a lower float all the same: `zeros([2])`, `cos(int)`."""
    value = graph.tensor(node)
    if value is None or value.dtype not in _LOWER or not isinstance(node.target, OpOverload):
        return False
    read = [graph.tensor(n) for n in graph.inputs(node)]
    return not any(t is not None and (t.is_floating_point() or t.is_complex()) for t in read)


def _cast_integers(raised: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Cast the tensors that a pointwise call computes with, not those it chooses by."""
    names = graph.argument_names(node.target)
    with raised.inserting_before(new):
        for i, (name, old) in enumerate(zip(names, node.args, strict=False)):
            if graph.is_tensor(old) and name not in _CHOOSING:
                new.update_arg(i, raised.call_function(torch.ops.aten.to.dtype, (new.args[i], torch.float64)))


def _widen_choice(raised: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """where(condition, 0.0, -1e300) -> where(condition, full([], 0.0), full([], -1e300))"""
    options: dict[str, graph.Argument] = {"dtype": torch.float64, "device": graph.device(node)}
    with raised.inserting_before(new):
        for i in (1, 2):
            new.update_arg(i, raised.call_function(torch.ops.aten.full.default, ([], new.args[i]), options))
    new.target = torch.ops.aten.where.self


def _raise_literal(x: graph.Argument) -> graph.Argument:
    """fp64 (complex128) for a lower dtype, fp64's extreme for a lower dtype's; anything else as it is."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x in _LOWER else torch.complex128 if x in _LOWER_COMPLEX else x
    return _EXTREMES.get(x, x) if isinstance(x, float) else x


def _sets_grad_mode(node: fx.Node) -> bool:
    """Whether a call is the tracer's record of a grad mode: running it would switch the caller's."""
    return getattr(node.target, "__name__", "") in ("_set_grad_enabled", "set_grad_enabled")


def _twin(x: object) -> object:
    """An independent copy of a tensor, in fp64 (complex128) if it is lower; anything else itself."""
    if not isinstance(x, torch.Tensor):
        return x
    dtype = _raise_literal(x.dtype)
    assert isinstance(dtype, torch.dtype)
    return x.detach().to(dtype, copy=True)


def _twins(*inputs: object) -> tuple[object, ...]:
    """The twin of each input; inputs that are one tensor get one twin, so that a write shows in both."""
    made: dict[int, object] = {}
    return tuple(made.setdefault(id(x), _twin(x)) if isinstance(x, torch.Tensor) else x for x in inputs)


# ---------------------------------------------------------------------------------------------- judging


def _judge_one(where: str, expected: object, reference: object, found: object, dtype: torch.dtype) -> Verdict:
    """The rule on one leaf."""
    exact = Verdict(True, 0.0, 0.0, 0.0, where)
    if not isinstance(found, torch.Tensor) or not isinstance(reference, torch.Tensor):
        equal = type(found) is type(reference) and found == reference
        return exact if equal else _refused(where, f"is {_kind(found)}, eager's is {_kind(reference)}")
    if found.shape != reference.shape or found.dtype != reference.dtype:
        return _refused(where, f"is {_kind(found)}, eager's is {_kind(reference)}")
    if not reference.is_floating_point():
        return exact if torch.equal(reference, found) else _refused(where, "differs from eager's integers")
    if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
        return _refused(where, f"is {_kind(found)}, the oracle's is {_kind(expected)}")
    if expected.dtype != torch.float64:
        raise ValueError(f"the oracle's {where} is {expected.dtype}; make the oracle with raise_to_fp64")
    finite = torch.isfinite(reference)
    if not _same_where_not_finite(reference, found):
        return _refused(where, "infinities or nans stand elsewhere than in eager's")
    if not torch.isfinite(expected[finite]).all():
        return _refused(where, "the oracle is not finite where eager is")
    error, allowed = rmse(expected[finite], found[finite]), rmse(expected[finite], reference[finite])
    factor = 3 if dtype in HALF or reference.numel() < FEW_ELEMENTS else 2
    limit = factor * allowed + TOLERANCE[dtype] / 10
    if error <= limit:
        return Verdict(True, error, allowed, limit, where)
    terms = f"{factor} x eager's {allowed:.3g} + {TOLERANCE[dtype] / 10:.0e}"
    reason = f"{where}: rmse {error:.3g} > {limit:.3g} ({terms})"
    return Verdict(False, error, allowed, limit, where, reason)


def _same_where_not_finite(reference: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether nan, inf and -inf stand in the same places."""
    tests = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(test(reference), test(found)) for test in tests)


def _refused(where: str, reason: str) -> Verdict:
    """Not ok whatever the numbers are."""
    return Verdict(False, math.inf, 0.0, 0.0, where, f"{where}: {reason}")


def _kind(x: object) -> str:
    """What a reason says of a leaf: dtype and shape of a tensor, else the value."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)


def _badness(verdict: Verdict) -> tuple[bool, float]:
    """Failures first, then by nearness to the limit."""
    return not verdict.ok, verdict.rmse_ours / verdict.limit if verdict.limit else verdict.rmse_ours


def _leaves(x: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Tensors, numbers and Nones of nested outputs, with their paths."""
    if isinstance(x, Mapping):
        for key, value in x.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from _leaves(value, f"{where}[{i}]")
    elif x is None or isinstance(x, (torch.Tensor, bool, int, float, str)):
        yield where or "output", x
    else:
        what = f"{where or 'output'} is a {type(x).__name__}"
        raise TypeError(f"{what}; pass its tensors (of a cache its keys and values)")
