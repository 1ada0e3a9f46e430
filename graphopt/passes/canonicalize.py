"""Canonicalize: any captured graph -> the one spelling that patterns are written in.

In one walk: mutation becomes values (`functionalize`), each call is respelled (`spellings`), equal pure calls
become one, no-ops and dead calls go. Patterns are canonicalised by this same pass, else nothing would match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from graphopt import graph as g
from graphopt.passes.functionalize import functionalize
from graphopt.passes.layout import STRIDE_SENSITIVE, dim_order, keep_copies_below_sparse_outputs
from graphopt.passes.speller import Speller

if TYPE_CHECKING:
    from graphopt.pipeline import Context


@dataclass(frozen=True)
class Canonicalize:
    """any ATen graph -> canonical graph. Bitwise exact; keeps eager's strides and aliasing at the outputs."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset({"canonical"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "bitwise"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place.

        Raises:
            CaptureRefused: a mutation that has no meaning as a value.
        """
        canonicalize(gm)


def canonicalize(gm: fx.GraphModule) -> None:
    """Respell a graph in place; see `Canonicalize`."""
    source = functionalize(gm)
    if "output_strides" not in gm.meta:
        gm.meta["output_strides"] = tuple(dim_order(v) for v in _output_values(gm.graph))
    keep_copies_below_sparse_outputs(source.graph)
    speller = Speller(keep_layout=any(g.is_call(n, *STRIDE_SENSITIVE) for n in source.graph.nodes))
    for node in source.graph.nodes:
        speller.visit(node)
    gm.graph = speller.graph
    g.eliminate_dead_code(gm.graph)
    gm.recompile()


def _output_values(graph: fx.Graph) -> list[object]:
    return [g.val(x) if isinstance(x, fx.Node) else x for x in g.flat_arguments(g.output_node(graph))]
