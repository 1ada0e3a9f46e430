"""Shard: the graph becomes that of one rank of several, which share its weights and its work.

y = linear(act(linear(x, W1)), W2)   ->   y = all_reduce(linear(act(linear(x, W1[r])), W2[:, r]), "tp")
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import ShardError
from graphopt.listing import listing
from graphopt.observe import Matched, Refused, Warned, emit
from graphopt.rewrite import Match, Refusal
from graphopt.sharding.elementwise import PRODUCT_RULES, is_pointwise, pointwise
from graphopt.sharding.flow import Flow, names_behind, where
from graphopt.sharding.held import held
from graphopt.sharding.local import Local
from graphopt.sharding.plan import Pinned, Plan
from graphopt.sharding.rules import RULES, unknown
from graphopt.sharding.views import VIEW_RULES
from graphopt.sharding.weights import Parts

if TYPE_CHECKING:
    from graphopt.pipeline import Context

RULE = "shard"
PLAN_HASH = "plan_hash"  # in the graph module's meta: equal on all ranks that may run together
BYTES = "sharded_bytes"  # in the graph module's meta, for the report: of all weights, and of the rank's
HELD = "held_heads"  # in the graph module's meta: a `sharding.held.Held`
SHARED = "sharded"  # in the graph module's meta: a `Shared`


@dataclass(frozen=True)
class Shared:
    """What a pass has shared.

    Attributes:
        world, rank: of the mesh axis.
        kinds: (weight name, "column", "row" or "vocabulary"); weights that are not named are whole.
        bytes: of the program's weights, and of what the rank reads of them.
    """

    world: int
    rank: int
    kinds: tuple[tuple[str, str], ...]
    bytes: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """Tensor parallelism, decided by data flow.

    Every linear tries to share its output features; heads, gated halves and packed projections follow. A
    linear that reads shared features shares its inputs, and its results are summed where a call first needs
    the sum. A vocabulary is shared by rows, filled up where ranks do not divide it, and logits are gathered.
    What an operator needs whole stays whole, and the report says why. A cache keeps the caller's shape; a
    rank's own heads of it are used, zeros stand for the others.

    Attributes:
        world: how many ranks; 1 changes nothing.
        rank: whose graph it becomes.
        axis: the mesh axis of the collectives.
        plan: pattern of weight or module names -> "colwise", "rowwise", "replicated", ... (`sharding.plan`),
            as Hugging Face's `base_model_tp_plan`; it comes before data flow.

    Raises:
        ShardError: from `run`, before the graph is changed: what would be shared does not divide; the plan
            contradicts itself. When made: a world, rank or axis that cannot be.
    """

    world: int = 1
    rank: int = 0
    axis: str = "tp"
    plan: Plan = field(default=())

    name: ClassVar[str] = "shard"
    requires: ClassVar[frozenset[str]] = frozenset({"recognised"})
    provides: ClassVar[frozenset[str]] = frozenset({"sharded"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"sharded", "quantized", "lowered"})
    exactness: ClassVar[str] = "reordered"

    def __post_init__(self) -> None:
        if type(self.world) is not int or type(self.rank) is not int or not 0 <= self.rank < self.world:
            raise ShardError(f"rank {self.rank} of {self.world}: give 0 <= rank < world, and world >= 1")
        if not self.axis.isidentifier():
            raise ShardError(f"axis {self.axis!r} is no name of a mesh axis, as 'tp'")
        Pinned.parse(self.plan)
        pairs = self.plan.items() if isinstance(self.plan, Mapping) else self.plan
        object.__setattr__(self, "plan", tuple(pairs))  # a pass hashes and compares

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        if self.world == 1:
            return
        flow = self.flow(gm.graph, ctx.deny)
        flow.settle()
        if ctx.ledger:
            ctx.ledger.closed = "a part of one rank's graph needs what ranks exchange to run"
        for pattern in flow.pinned.unmet():
            emit(
                ctx.observers, Warned(f"shard: the plan's {pattern!r} is the name of no weight of this graph")
            )
        gm.meta[PLAN_HASH] = self.digest(flow)
        kinds = {name: kind for node, kind in flow.kinds.items() for name in names_behind(weight_of(node))}
        before = bytes_read(gm.graph)
        self.tell(flow, ctx)
        gm.meta[HELD] = held(flow)
        origin = g.Origin(RULE, f"{RULE}@-#{gm.meta[PLAN_HASH][:6]}", ())
        Local(flow, self.axis, self.rank, Parts(gm.graph, flow.weights, origin)).run()
        g.eliminate_dead_code(gm.graph)
        after = bytes_read(gm.graph)
        gm.meta[SHARED] = Shared(self.world, self.rank, tuple(kinds.items()), (before, after))
        gm.meta[BYTES] = (before, after)
        gm.recompile()

    def flow(self, graph: fx.Graph, deny: frozenset[str] = frozenset()) -> Flow:
        """The flow of a graph, before it has settled."""
        pinned = Pinned.parse(self.plan)
        rules = {n.target: pointwise for n in graph.nodes if is_pointwise(n.target)}
        flow = Flow(graph, self.world, {**rules, **VIEW_RULES, **PRODUCT_RULES, **RULES}, unknown, pinned)
        flow.whole |= {node: "denied" for node in graph.nodes if deny and identify(node) in deny}
        return flow

    def digest(self, flow: Flow) -> str:
        """A hash of what the ranks must agree in: the graph, how it is shared, options and versions."""
        text = re.sub(r"cuda:\d+", "cuda", listing(flow.graph))  # a rank's own device
        text = re.sub(r"^(%\d+) \S+ = ", r"\1 = ", text, flags=re.MULTILINE)  # names count up in a process
        text = re.sub(r" +", " ", text)
        number_of = {node: i for i, node in enumerate(flow.graph.nodes)}
        kinds = [f"{number_of[node]} {kind}" for node, kind in flow.kinds.items()]
        about = (text, kinds, self.world, self.axis, repr(self.plan), torch.__version__)
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def tell(self, flow: Flow, ctx: Context) -> None:
        """Say what is shared, and what is not, and why."""
        for node, kind in flow.kinds.items():
            rule = f"{RULE}_{kind}"
            match = Match(
                identify(node), rule, g.module_path(node), g.source(node), (node.name,), (node.name,)
            )
            emit(ctx.observers, Matched(match))
        for node, why in flow.whole.items():
            if node not in flow.kinds:
                emit(ctx.observers, Refused(refusal(node, f"left whole: {why}")))
        for node, rows in flow.whole_rows.items():
            if node in flow.kinds and rows:
                why = next(iter(rows.values()))
                emit(ctx.observers, Refused(refusal(node, f"{len(rows)} of its rows left whole: {why}")))


def bytes_read(graph: fx.Graph) -> int:
    """The bytes of the weights, or of what is made of weights alone, that the other calls read."""
    made = g.weight_only(graph)
    read = [g.tensor(n) for n in made if any(user not in made for user in n.users)]
    return sum(v.numel() * v.element_size() for v in read if v is not None)


def refusal(node: fx.Node, reason: str) -> Refusal:
    """Why a linear is not shared."""
    return Refusal(RULE, node.name, where(node), g.source(node), reason, 1)


def identify(node: fx.Node) -> str:
    """A stable id of a shared linear: rule @ module # hash of its weight's shape and names."""
    if node.op != "call_function" or not node.args:
        return ""
    weight = weight_of(node)
    about = (names_behind(weight), str(g.shape(weight)) if g.is_tensor(weight) else "")  # type: ignore[arg-type]
    digest = hashlib.sha1(repr(about).encode(), usedforsecurity=False).hexdigest()[:6]
    return f"{RULE}@{g.module_path(node) or '-'}#{digest}"


def weight_of(node: fx.Node) -> object:
    """The weight of a linear or an embedding."""
    return g.arg(node, "weight") if g.is_call(node, ops.linear.overload) else node.args[0]
