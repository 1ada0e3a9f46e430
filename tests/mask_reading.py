"""Read a mask for what it means, and run the reading against the mask that it claims to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.masks import MaskForm, arguments, classify
from graphopt.passes.canonicalize import canonicalize

MIN = torch.finfo(torch.float32).min
INF = float("-inf")

Mask = Callable[..., torch.Tensor]


def traced(mask: Mask, examples: Sequence[torch.Tensor], symbolic: bool = False) -> fx.GraphModule:
    """The canonical graph of a function; `symbolic`: every dimension of every example is its own size."""
    mode = torch_private.new_fake_mode(symbolic=symbolic)
    fakes: list[object] = []
    for n, x in enumerate(examples):
        if not symbolic:
            fakes.append(mode.from_tensor(x, static_shapes=True))
            continue
        sizes = [torch_private.symbolic_int(mode, f"s{n}_{d}", size) for d, size in enumerate(x.shape)]
        with mode:
            fakes.append(torch.empty(sizes, dtype=x.dtype))
    gm = torch_private.trace(mask, fakes, mode)
    canonicalize(gm)
    return gm


def mask_node(gm: fx.GraphModule) -> fx.Node:
    """The output of a graph of one output."""
    result = g.output_node(gm.graph).args[0]
    return result[0] if isinstance(result, (list, tuple)) else result  # type: ignore[return-value]  # one output


def read(mask: Mask, *examples: torch.Tensor, heads: int = 3, symbolic: bool = False) -> MaskForm:
    """The form of a mask; its arguments, made in the graph and run there, must give the mask itself."""
    gm = traced(mask, examples, symbolic)
    node = mask_node(gm)
    sizes = (1, 1, 1, 1, *g.shape(node))[-4:]
    form = classify(node, (sizes[0], heads if sizes[1] == 1 else sizes[1], *sizes[2:]))
    assert isinstance(form, MaskForm), form
    assert_same_mask(gm, form, mask, examples)
    return form


def assert_same_mask(
    gm: fx.GraphModule, form: MaskForm, mask: Mask, examples: Sequence[torch.Tensor]
) -> None:
    """Run the made arguments in the graph, apply the definition of `ops.attention`, compare with eager."""
    made = arguments(form)
    parts = (made.offset, made.offset_tensor, made.window, made.key_padding, made.bias)
    g.output_node(gm.graph).args = (parts,)
    gm.graph.lint()
    gm.recompile()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values = [random_like(x, generator) for x in examples]
        want = ~mask(*values) if form.inverted else mask(*values)
        offset, tensor, window, padding, bias = gm(*values)
        q, k = ((1, 1, *want.shape))[-2:]
        i, j = torch.arange(q)[:, None], torch.arange(k)
        off = offset if tensor is None else offset + tensor
        keep = torch.ones(1, 1, q, k, dtype=torch.bool)
        keep = keep & (j <= i + off) if made.causal else keep
        keep = keep & (j > i + off - window) if window is not None else keep
        keep = keep & padding[:, None, None, :] if padding is not None else keep
        keep = keep & bias if bias is not None and bias.dtype == torch.bool else keep
        got = keep
        if want.dtype != torch.bool:
            got = torch.zeros(keep.shape, dtype=want.dtype).masked_fill(~keep, form.additive_fill or INF)
            got = got + bias if bias is not None and bias.dtype != torch.bool else got
        torch.testing.assert_close(*torch.broadcast_tensors(got, want), rtol=0, atol=0)


def random_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Coin flips for bool, small numbers for int, normal ones for float."""
    if x.dtype.is_floating_point:
        return torch.randn(x.shape, generator=generator).to(x.dtype)
    numbers = 2 if x.dtype == torch.bool or x.dim() else 5
    return torch.randint(numbers, x.shape, generator=generator).to(x.dtype)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def flags(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


def indices(batch: int, q: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch, query and key indices as the model library makes them: 4-D, each along its own dimension."""
    return (
        torch.arange(batch)[:, None, None, None],
        torch.arange(q)[None, None, :, None],
        torch.arange(k)[None, None, None, :],
    )


def library_mask(
    padding: torch.Tensor, q: int, k: int, offset: object = 0, window: int | None = None
) -> torch.Tensor:
    """`causal & window & padding[b, j]` in the spelling of the model library, without vmap."""
    b, i, j = indices(padding.shape[0], q, k)
    i = i + offset
    mask = i.new_ones((), dtype=torch.bool)
    if window is not None:
        mask = mask & (j > i - window).to(mask.device)
    mask = mask & (j <= i).to(mask.device)
    return (mask & padding.to(torch.bool)[b, j]).expand(padding.shape[0], -1, q, k)
