"""Lower: a recognised graph -> a graph of direct calls to kernels, run on the caller's inputs and weights."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.listing import listing
from graphopt.lowering.cache_writes import advance_lengths, group_cache_writes
from graphopt.lowering.collectives import bind_collectives
from graphopt.lowering.direct import call_directly
from graphopt.lowering.fold import fold, shift_norm_weights
from graphopt.lowering.masks import lower_masks
from graphopt.lowering.replay import Replay, Roles, replayable, roles
from graphopt.lowering.select import select
from graphopt.lowering.write_back import update_fresh, write_in_place
from graphopt.targets import CPU, target_named

if TYPE_CHECKING:
    from graphopt.pipeline import Context


@dataclass(frozen=True)
class Lower:
    """recognised graph -> kernels, prepared weights, in-place caches, eager's output strides.

    The graph module stays callable, with the same inputs; `ctx.run` becomes the `Lowered` that runs it, for a
    GPU target from a CUDA graph where that is safe. A GPU target needs no GPU to be lowered for.
    Options: `target`, None for the context's.
    """

    target: str | None = None

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "reordered"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        target = self.target or ctx.target
        if target == CPU:
            lower_masks(gm.graph)  # kernels for GPUs have them built in
            shift_norm_weights(gm.graph)
        write_in_place(gm.graph)  # before fold: it looks at who reads an input, not at kernels
        update_fresh(gm.graph)
        if target != CPU:
            target_named(target)
            advance_lengths(gm.graph)  # before the writes: they read a length that is not advanced yet
            group_cache_writes(gm.graph)
        fold(gm, ctx.store)
        plain = replayable(gm.graph) if target != CPU else "a CPU has no graphs"
        parts = roles(gm.graph)  # by schemas, which kernels do not have
        g.eliminate_dead_code(gm.graph)  # the last: kernels are plain functions, of which it knows nothing
        bind_collectives(gm.graph, ctx.mesh)
        if ctx.ledger:
            ctx.ledger.see(gm)
        select(gm.graph, ctx.kernels, target, ctx.observers, ctx.deny, ctx.ledger)
        keep_output_strides(gm)
        call_directly(gm.graph)
        gm.recompile()
        ctx.run = Lowered(gm, parts if plain is None and ctx.replay else None)


class Lowered:
    """What runs: from the flat inputs and weights of the graph's placeholders to its flat outputs.

    Prepared weights are looked up by the tensors that are passed, so one instance serves any number of
    weight sets. With `replayed`, a GPU runs it from a CUDA graph (`lowering/replay`).
    """

    def __init__(self, gm: fx.GraphModule, replayed: Roles | None = None) -> None:
        self.gm = gm
        torch_private.compile_now(gm)
        self._forward = Replay(gm, replayed) if replayed else gm.forward  # past nn.Module.__call__: 2 us

    def __call__(self, *args: object) -> object:
        """Run on values in placeholder order."""
        return self._forward(*args)

    @property
    def code(self) -> str:
        """The program as text, one line a call: shape, module path, the rule that made it, source line."""
        return listing(self.gm.graph)

    def calls(self) -> int:
        """How many functions one run calls; arithmetic on sizes and picking an output do not count."""
        return sum(
            node.op == "call_function" and node.target not in g.SIZE_OPS and not _picks(node)
            for node in self.gm.graph.nodes
        )

    def __repr__(self) -> str:
        return f"Lowered({self.calls()} calls)"


def _picks(node: fx.Node) -> bool:
    """Whether a node takes one of several outputs (a slice is spelled as indexing too, and counts)."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


# ----------------------------------------------------------------------------------------------- strides


def keep_output_strides(gm: fx.GraphModule) -> int:
    """Give each output the layout that it has in eager, `gm.meta["output_strides"]`; returns how many.

    Which layout a kernel's result has is known at run time only; where it is right already, the call is free.
    """
    orders: Sequence[tuple[int, ...] | None] = gm.meta.get("output_strides", ())
    output = g.output_node(gm.graph)
    values = list(g.flat_arguments(output))
    if len(values) != len(orders):
        return 0
    laid: dict[fx.Node, fx.Node] = {}
    with gm.graph.inserting_before(output):
        for value, order in zip(values, orders, strict=True):
            if order is None or not isinstance(value, fx.Node) or not _may_differ(value) or value in laid:
                continue
            if order == tuple(range(len(order))):
                new = gm.graph.call_function(torch.Tensor.contiguous, (value,))
            else:
                new = gm.graph.call_function(with_layout, (value, order))
            g.copy_provenance(new, value)
            g.set_val(new, g.val(value))
            laid[value] = new
    output.args = fx.node.map_arg(output.args, lambda n: laid.get(n, n))
    return len(laid)


def _may_differ(node: fx.Node) -> bool:
    """Whether an output's layout may not be eager's: not for inputs, which are returned as they came."""
    return g.is_tensor(node) and node.op != "placeholder" and g.rank(node) > 1


def with_layout(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """x with its dimensions stored in that order, slowest first; x itself where they are."""
    stored = x.permute(order)
    if stored.is_contiguous():
        return x
    back = [order.index(d) for d in range(len(order))]
    return stored.contiguous().permute(back)
