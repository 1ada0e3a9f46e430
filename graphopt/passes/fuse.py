"""Fuse: what one kernel can do at once becomes one call, for targets whose cost is the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.passes.canonicalize import canonicalize
from graphopt.patterns.fused import FUSIONS
from graphopt.rewrite import Rewriter
from graphopt.rule import Rule
from graphopt.translate import Translation

if TYPE_CHECKING:
    from graphopt.pipeline import Context


@dataclass(frozen=True)
class Fuse:
    """add_rms_norm(linear(silu(gate) * up), r) -> s = fused_linear(.., residual=r); rms_norm(s)

    Linears become `fused_linear` and take up norms, activations and residuals around them; those that took
    nothing up are linears again, which a library may do best. After Merge, Shard and Quantize: it sees the
    linears as they will run. What is left are the calls that a decoder layer needs: five or six.
    """

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"recognised"})
    provides: ClassVar[frozenset[str]] = frozenset({"fused"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "reordered"

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        packed = any(g.is_call(n, ops.linear_int8.overload) for n in gm.graph.nodes)
        for stage in FUSIONS:
            rules = tuple(r for r in stage if packed or not _of_packed(r))
            watching = tuple(ctx.observers)
            rewriter = Rewriter(
                gm, rules, canonicalize, watching, ctx.deny, ctx.fuel, ctx.question, ctx.ledger
            )
            rewriter.ids, rewriter.named = ctx.ids, ctx.named  # a rule may stand in several stages
            rewriter.run()
            ctx.fuel = rewriter.fuel
        gm.recompile()


def _of_packed(rule: Rule | Translation) -> bool:
    """Whether a rule is about weights in int8; without any there is no need to trace it."""
    return isinstance(rule, Rule) and "scales" in rule.specs
