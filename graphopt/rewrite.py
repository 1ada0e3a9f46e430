"""Edit a graph for a rule: the only code that does. What must hold at every edit is checked here, once.

An edit happens only if no inner value of the match is read from outside, everything the new nodes read comes
before everything that reads them, and the match's id is not denied. New nodes carry origin, module path,
source line and abstract value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.binding import Binding, Miss, target_name
from graphopt.ledger import Ledger
from graphopt.match import match, outside_reader
from graphopt.observe import Matched, Observer, Refused, emit
from graphopt.place import Place, find_place
from graphopt.question import Question
from graphopt.replay import Replay
from graphopt.rule import Canonicalise, Part, Rule, Variant, variants
from graphopt.rule_trace import needed_targets
from graphopt.template import Template, fake_result
from graphopt.translate import Translation

__all__ = ["Match", "Refusal", "Rewriter", "fake_result"]

SWEEP_BOUND = 12  # a rule set that still changes the graph after so many sweeps does not terminate
GROWTH = 8  # times the nodes that there were: rules that make more never end, or end too late
SMALL = 100  # nodes; below, a few replacements are already a multiple
KEPT_MISSES = 400  # per run; the report shows the nearest of each rule
DENIED = "deny"  # the guard of what was taken back
UNTRIED = "needed operators"  # the guard of a rule that was tried nowhere
REACH = (
    3  # how far below a match a larger one that contains it may end: a cast, a scale and a bias follow a norm
)


@dataclass(frozen=True)
class Match:
    """One applied match. `id` is stable over runs: rule, module path, structural hash, ordinal."""

    id: str
    rule: str
    module_path: str
    source: str
    nodes: tuple[str, ...]
    new_nodes: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """Why a rule did not apply at a place; `depth` is how many of its nodes had matched there.

    `node` is the first node that differs, with its module path and source line, `reason` all of it in words.
    `expected` and `found` are what the pattern and the model have there; `guard` is what refused a match that
    was complete. `anchor` is the node from which the rule was tried, in the module `anchor_path`.
    """

    rule: str
    node: str
    module_path: str
    source: str
    reason: str
    depth: int
    expected: str = ""
    found: str = ""
    guard: str = ""
    anchor: str = ""
    anchor_path: str = ""


@dataclass
class Rewriter:
    """Applies rules to one graph until nothing changes, telling observers.

    With a question, every miss that it is about is kept, however near; without one the nearest of each place.
    """

    gm: fx.GraphModule
    rules: tuple[Rule | Translation, ...]
    canonicalise: Canonicalise
    observers: tuple[Observer, ...] = ()
    deny: frozenset[str] = frozenset()
    fuel: int | None = None
    question: Question | None = None
    ledger: Ledger | None = None  # told what each rewrite took away and made
    ids: dict[str, int] = field(default_factory=dict)
    named: dict[tuple[str, fx.Node], str] = field(default_factory=dict)  # the ids of denied matches
    index: dict[object, list[Variant | Translation]] = field(default_factory=dict)  # by the anchor's operator
    misses: dict[tuple[str, fx.Node], Miss] = field(default_factory=dict)
    denied: dict[tuple[str, fx.Node], Miss] = field(default_factory=dict)
    replay: Replay = field(default_factory=Replay)
    spared: set[fx.Node] = field(default_factory=set)  # what denied matches would replace: no smaller one may
    told: dict[tuple[str, fx.Node], Refusal] = field(default_factory=dict)  # the answers to the question
    untried: dict[str, str] = field(default_factory=dict)  # rule -> why it was tried nowhere; "" if it was

    def run(self) -> int:
        """Sweep to a fixpoint; returns how many matches were applied. The caller recompiles the module.

        Raises:
            RuntimeError: the rules still change the graph after SWEEP_BOUND sweeps, or make it grow and grow.
        """
        applied, before = 0, max(len(self.gm.graph.nodes), SMALL)
        for _ in range(SWEEP_BOUND):
            if len(self.gm.graph.nodes) > GROWTH * before:
                raise RuntimeError(
                    f"the rules still change the graph, which has grown to {len(self.gm.graph.nodes)} nodes, "
                    f"more than {GROWTH} x {before}; one of them matches what it makes"
                )
            self.index = self.candidates()  # a replacement may bring the operator that another rule needs
            changed = self.sweep()
            applied += changed
            if not changed:
                break
            g.eliminate_dead_code(self.gm.graph)  # what a translation left unread would count as a reader
        else:
            raise RuntimeError(
                f"the rules still change the graph after {SWEEP_BOUND} sweeps; two of them undo each other"
            )
        g.eliminate_dead_code(self.gm.graph)
        self.report_misses()
        self.gm.graph.lint()
        return applied

    def candidates(self) -> dict[object, list[Variant | Translation]]:
        """What can occur in this graph, by the operator of its anchor, in the rules' order.

        Only rules whose operators are all here are traced: the others cannot match.
        """
        found: dict[object, list[Variant | Translation]] = {}
        dtypes = {v.dtype for n in self.gm.graph.nodes if isinstance(v := g.val(n), torch.Tensor)}
        targets = {n.target for n in self.gm.graph.nodes if n.op == "call_function"}
        for rule in self.rules:
            if isinstance(rule, Translation):
                for target in rule.targets(targets):
                    found.setdefault(target, []).append(rule)
                continue
            missing = needed_targets(rule, self.canonicalise) - targets
            if missing:  # of the first sweep: later ones have fewer of torch's operators
                needed = ", ".join(sorted(map(target_name, missing)))
                self.untried.setdefault(rule.name, f"no {needed} in the graph")
            if not missing:
                self.untried[rule.name] = ""
                for variant in variants(rule, dtypes, self.canonicalise):
                    found.setdefault(variant.anchor.target, []).append(variant)
        return found

    # ---------------------------------------------------------------------------------------------- looking

    def sweep(self) -> int:
        """Visit every node once, in order, and apply the first rule that matches there."""
        if self.question is None:
            self.misses.clear()
        changed = 0
        for node in list(self.gm.graph.nodes):
            if self.fuel == 0:
                break
            if node.op == "call_function" and not node._erased:
                changed += any(self.visit(candidate, node) for candidate in self.index.get(node.target, ()))
        return changed

    def visit(self, candidate: Variant | Translation, node: fx.Node) -> bool:
        """Try one candidate at a node; a miss is kept if it came far enough to be worth reading."""
        if isinstance(candidate, Translation):
            return self.translate(candidate, node)
        # What is replayed names the place that was looked at first.
        found = self.replay.match(candidate, node) if self.question is None else match(candidate, node)
        if isinstance(found, Miss):
            self.keep_miss(candidate.rule.name, node, found)
            return False
        return self.take(candidate, found, node)

    def take(self, variant: Variant, found: Binding, node: fx.Node) -> bool:
        """Apply a match, or a larger one that contains it.

        A bf16 row's norm may end in a cast; what stands before the cast is the norm of an fp32 row.
        """
        inside = set(found.nodes.values())
        for below in downstream(node):
            for candidate in self.index.get(below.target, ()):
                if isinstance(candidate, Translation):
                    continue
                other = match(candidate, below)
                if isinstance(other, Binding) and inside <= set(other.nodes.values()):
                    if self.take(candidate, other, below):
                        return True
        return self.apply(variant, found)

    def keep_miss(self, rule: str, node: fx.Node, miss: Miss) -> None:
        """Keep the miss that came furthest at a node."""
        if miss.depth > 1 or self.question is not None:
            known = self.misses.get((rule, node))
            if known is None or known.depth < miss.depth:
                self.keep(rule, node, miss)

    def keep(self, rule: str, node: fx.Node, miss: Miss) -> None:
        """Keep a miss; one that is asked about in words at once, because its nodes may soon be gone."""
        self.misses[rule, node] = miss
        if self.question is not None:
            told = refusal(rule, node, miss)
            if self.question.about_refusal(told):
                self.told[rule, node] = told

    def report_misses(self) -> None:
        """Tell what was denied and the misses of the last sweep, the nearest first."""
        if self.question is not None:
            untried = [
                Refusal(rule, "", "", "", reason, 0, guard=UNTRIED) for rule, reason in self.untried.items()
            ]
            for answer in (*self.told.values(), *(r for r in untried if r.reason)):
                emit(self.observers, Refused(answer))
            return
        misses = {**self.misses, **self.denied}
        nearest = sorted(misses.items(), key=lambda item: -item[1].depth)[:KEPT_MISSES]
        for (name, anchor), miss in nearest:
            emit(self.observers, Refused(refusal(name, anchor, miss)))

    # ---------------------------------------------------------------------------------------------- editing

    def translate(self, translation: Translation, node: fx.Node) -> bool:
        """Say a torch operator in our vocabulary."""
        arguments = translation.arguments(node)
        identity = self.name_match(translation.name, node, [_about(n) for n in node.all_input_nodes])
        if isinstance(arguments, str):
            guard = getattr(translation.arguments, "__name__", "arguments")
            self.keep(translation.name, node, Miss(1, node, arguments, guard=guard))
            return False
        if identity in self.deny:
            self.take_back(translation.name, identity, node, 1)
            return False
        args = tuple(arguments.get(a.name, a.default_value) for a in g.schema_arguments(translation.op))
        name = g.base_name(translation.op)
        before = self.ledger.took((node,)) if self.ledger else ()
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.create_node("call_function", translation.op, args, name=name)  # type: ignore[arg-type]
        adopt(new, node, g.Origin(translation.name, identity, _stands_for([node])), g.val(node))
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)
        done = Match(identity, translation.name, g.module_path(new), g.source(new), (node.name,), (new.name,))
        if self.ledger:
            self.ledger.rewrote(done, (translation.arguments,), before, ((node, new),))
        self.applied(done)
        return True

    def apply(self, variant: Variant, binding: Binding) -> bool:
        """Replace a match; False, with a refusal kept, if it must not be."""
        outputs = [binding.nodes[p] for p in variant.pattern.outputs if isinstance(p, Part)]
        anchor, rule = outputs[0], variant.rule.name
        identity = self.identify(variant.rule, binding, anchor)
        if identity in self.deny:
            self.take_back(rule, identity, anchor, len(binding.nodes))
            self.spared.update(binding.nodes.values())
            return False
        place = find_place(binding, outputs)
        reason, guard = unsafe(variant, binding), unsafe.__name__
        if not self.spared.isdisjoint(binding.nodes.values()):
            reason, guard = "a part of it belongs to a match that is denied", DENIED
        if isinstance(place, str) and not reason:
            reason, guard = place, find_place.__name__
        if reason:
            self.keep(rule, anchor, Miss(len(binding.nodes), anchor, reason, guard=guard))
            return False
        assert isinstance(place, Place)
        for late in place.hoisted:
            place.node.prepend(late)
        for value, number in binding.assumed:
            torch_private.specialise(value, number)
        replaced = list(dict.fromkeys(binding.nodes.values()))
        before = self.ledger.took(replaced) if self.ledger else ()
        origin = g.Origin(rule, identity, _stands_for(replaced))
        grown = {n.target: n for n in replaced}  # an op that takes its neighbours up stays where it was
        template = Template(
            self.gm.graph,
            variant.replacement,
            binding,
            place.node,
            outputs,
            lambda new, old, value: adopt(new, grown.get(new.target, old or anchor), origin, value),
        )
        made = template.instantiate()
        pairs = [(old, n) for old, n in zip(outputs, made, strict=True) if isinstance(n, fx.Node)]
        for old, fresh in pairs:
            old.replace_all_uses_with(fresh)
        for node in sorted(replaced, reverse=True):
            if not node.users:
                self.gm.graph.erase_node(node)
        added = tuple(fresh.name for _, fresh in pairs)
        done = Match(identity, rule, g.module_path(anchor), g.source(anchor), origin.replaced, added)
        if self.ledger:
            self.ledger.rewrote(done, variant.rule.functions(), before, pairs)
        self.applied(done)
        for _, fresh in pairs:
            shorten_reshapes(fresh)
        return True

    def applied(self, done: Match) -> None:
        """Tell, count, and burn fuel."""
        self.count(done.id)
        emit(self.observers, Matched(done))
        if self.fuel is not None:
            self.fuel -= 1

    def take_back(self, rule: str, identity: str, anchor: fx.Node, depth: int) -> None:
        """Leave a denied match alone: told, and counted once, so that those after it keep their ids."""
        miss = self.denied[rule, anchor] = Miss(depth, anchor, "denied", guard=DENIED)
        self.keep(rule, anchor, miss)
        if (identity.split("~")[0], anchor) not in self.named:
            self.named[identity.split("~")[0], anchor] = identity
            self.count(identity)

    def count(self, identity: str) -> None:
        """One more match of a base id: the next has the next ordinal."""
        base = identity.split("~")[0]
        self.ids[base] = self.ids.get(base, 0) + 1

    # ------------------------------------------------------------------------------------------------ names

    def identify(self, rule: Rule, binding: Binding, anchor: fx.Node) -> str:
        """A stable id: rule @ module path # structural hash (~ ordinal, where one module has several)."""
        shapes = [f"{n}:{_about(v)}" for n, v in binding.leaves.items() if isinstance(v, fx.Node)]
        names = [f"{n}={v if isinstance(v, str) else g.number(v)}" for n, v in binding.names.items()]
        return self.name_match(rule.name, anchor, [*shapes, *names])

    def name_match(self, rule: str, anchor: fx.Node, about: list[str]) -> str:
        """A match's id from its rule, its place and what is known about it."""
        digest = hashlib.sha1(";".join(about).encode(), usedforsecurity=False).hexdigest()[:6]
        base = f"{rule}@{g.module_path(anchor) or '-'}#{digest}"
        if (base, anchor) in self.named:
            return self.named[base, anchor]
        ordinal = self.ids.get(base, 0)
        return f"{base}~{ordinal + 1}" if ordinal else base


# -------------------------------------------------------------------------------- what must hold at an edit


def refusal(rule: str, anchor: fx.Node, miss: Miss) -> Refusal:
    """A miss in words."""
    node = miss.node
    return Refusal(
        rule=rule,
        node=node.name,
        module_path=g.module_path(node),
        source=g.source(node),
        reason=miss.reason,
        depth=miss.depth,
        expected=miss.expected,
        found=miss.found,
        guard=miss.guard,
        anchor=anchor.name,
        anchor_path=g.module_path(anchor),
    )


def unsafe(variant: Variant, binding: Binding) -> str:
    """Why the match must not be applied although it fits; checked again right before the edit."""
    if any(n._erased for n in binding.nodes.values()):
        return "another rewrite has replaced a part of it"
    outside = outside_reader(variant, binding)
    if outside is not None:
        return outside[1]
    for leaf in binding.leaves.values():
        if (
            isinstance(leaf, fx.Node)
            and leaf.meta.get("keep")
            and any(g.is_mutable(u.target) for u in leaf.users)
        ):
            return f"{leaf.name} is written in place by an operator that has no pure form"
    return ""


def shorten_reshapes(node: fx.Node) -> None:
    """reshape(reshape(x, a), b) -> reshape(x, b), or x of that shape, where a replacement ends in one."""
    if not g.is_call(node, torch.ops.aten.reshape.default):
        return
    x = node.args[0]
    assert isinstance(x, fx.Node)
    for user in list(node.users):
        if not g.is_call(user, torch.ops.aten.reshape.default):
            continue
        if g.same_shape(g.shape(user), g.shape(x)):
            user.replace_all_uses_with(x)
        else:
            user.args = (x, *user.args[1:])
    if not node.users:
        node.graph.erase_node(node)  # else it would be another reader of x


def downstream(node: fx.Node) -> Iterator[fx.Node]:
    """The calls that alone read the node, one after the other, REACH at most."""
    for _ in range(REACH):
        if len(node.users) != 1:
            return
        (node,) = node.users
        if node.op != "call_function":
            return
        yield node


def adopt(new: fx.Node, old: fx.Node, origin: g.Origin, value: object) -> None:
    """Give a new node its provenance and its value."""
    g.copy_provenance(new, old)
    new.meta["origin"] = origin
    g.set_val(new, value)


def _about(node: fx.Node) -> str:
    """Shape and dtype of a match's input."""
    value = g.val(node)
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{[s if isinstance(s, int) else str(s) for s in value.shape]}{value.dtype}"


def _stands_for(replaced: Iterable[fx.Node]) -> tuple[str, ...]:
    """The captured nodes behind the replaced ones: a rewrite of a rewrite stands for what the first did."""
    names: dict[str, None] = {}
    for node in replaced:
        before = g.origin(node)
        names.update(dict.fromkeys((*(before.replaced if before else ()), node.name)))
    return tuple(names)
