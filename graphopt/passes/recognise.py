"""Recognise: canonical ATen -> the vocabulary, by rules; scores left over go back; masks become arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from graphopt import graph as g
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.duplicates import merge_made
from graphopt.passes.leftovers import dissolve_scores, report_products
from graphopt.passes.masks import read_masks
from graphopt.passes.mixtures import read_mixtures
from graphopt.rewrite import Rewriter

if TYPE_CHECKING:
    from graphopt.pipeline import Context


@dataclass(frozen=True)
class Recognise:
    """softmax(q @ k^T * s + mask) @ v -> attention(q, k, v, s, causal=…), and so on for each rule.

    Rules run to a fixpoint; of two matches of which one contains the other, the larger is taken. What the
    rules use half-way (`attention_scores`, `attention_weights`) is not in the result.
    """

    name: ClassVar[str] = "recognise"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"recognised"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "reordered"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        watching = tuple(ctx.observers)
        rewriter = Rewriter(
            gm, ctx.rules, canonicalize, watching, ctx.deny, ctx.fuel, ctx.question, ctx.ledger
        )
        rewriter.ids, rewriter.named = ctx.ids, ctx.named  # a rule may stand in a later pass, too
        rewriter.run()
        ctx.fuel = rewriter.fuel
        read_mixtures(gm, ctx)
        report_products(gm, ctx.observers)
        if dissolve_scores(gm, ctx.observers):
            g.eliminate_dead_code(gm.graph)  # a negation of a mask that is filled again
        merge_made(gm)
        if ctx.ledger:
            ctx.ledger.see(gm)
        read_masks(gm, ctx.observers, ctx.deny, ctx.ledger)
        gm.recompile()
