"""Recognise: canonical ATen -> the vocabulary, by rules; then masks become arguments of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.masks import read_masks
from graphopt.rewrite import Rewriter

if TYPE_CHECKING:
    from graphopt.pipeline import Context


@dataclass(frozen=True)
class Recognise:
    """softmax(q @ k^T * s + mask) @ v -> attention(q, k, v, s, causal=…), and so on for each rule.

    Rules run to a fixpoint; of two matches of which one contains the other, the larger is taken.
    """

    name: ClassVar[str] = "recognise"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"recognised"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "reordered"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        rewriter = Rewriter(gm, ctx.rules, canonicalize, tuple(ctx.observers), ctx.deny, ctx.fuel)
        rewriter.run()
        ctx.fuel = rewriter.fuel
        read_masks(gm, ctx.observers, ctx.deny)
        gm.recompile()
