"""Edit a graph for a rule: the only code that does. What must hold at every edit is checked here, once.

An edit happens only if no inner value of the match is read from outside, everything the new nodes read comes before
everything that reads them, and the match's id is not denied. New nodes carry their origin, module path, source line and
abstract value.
"""

from __future__ import annotations

import ast
import hashlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.match import Binding, Miss, evaluate, match, outside_reader
from graphopt.observe import Matched, Observer, Refused, emit
from graphopt.rule import Carried, Parameter, Part, Rule, Symbolic, Variant, variants
from graphopt.rule_trace import needed_targets
from graphopt.translate import Translation

aten = torch.ops.aten
SWEEP_BOUND = 12  # a rule set that still changes the graph after so many sweeps does not terminate
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}
KEPT_MISSES = 400  # per run; the report shows the nearest of each rule


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
    """Why a rule did not apply at a place; `depth` is how many of its nodes had matched there."""

    rule: str
    node: str
    module_path: str
    source: str
    reason: str
    depth: int


@dataclass
class Rewriter:
    """Applies rules to one graph until nothing changes, telling observers."""

    gm: fx.GraphModule
    rules: tuple[Rule | Translation, ...]
    observers: tuple[Observer, ...] = ()
    deny: frozenset[str] = frozenset()
    fuel: int | None = None
    order: dict[fx.Node, float] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    misses: dict[tuple[str, fx.Node], Miss] = field(default_factory=dict)
    sizes: dict[object, fx.Node] = field(default_factory=dict)

    def run(self) -> int:
        """Sweep to a fixpoint; returns how many matches were applied.

        Raises:
            RuntimeError: the rules still change the graph after SWEEP_BOUND sweeps.
        """
        index = self.index()
        applied = 0
        for number in range(SWEEP_BOUND):
            # From the end first: a pattern with its casts is found before the fp32 variant inside it.
            changed = self.sweep(index, from_end=number == 0)
            applied += changed
            if not changed:
                break
        else:
            raise RuntimeError(f"the rules still change the graph after {SWEEP_BOUND} sweeps; two of them undo each other")
        g.eliminate_dead_code(self.gm.graph)
        self.report_misses()
        self.gm.graph.lint()
        self.gm.recompile()
        return applied

    def index(self) -> dict[object, list[Variant | Translation]]:
        """What can occur in this graph, by the operator of its anchor, in the rules' order.

        Only rules whose operators are all here are traced: the others cannot match.
        """
        found: dict[object, list[Variant | Translation]] = {}
        dtypes = {v.dtype for n in self.gm.graph.nodes if isinstance(v := g.val(n), torch.Tensor)}
        targets = {n.target for n in self.gm.graph.nodes if n.op == "call_function"}
        for rule in self.rules:
            if isinstance(rule, Translation):
                found.setdefault(rule.target, []).append(rule)
            elif needed_targets(rule) <= targets:
                for variant in variants(rule, dtypes):
                    found.setdefault(variant.anchor.target, []).append(variant)
        return found

    def sweep(self, index: Mapping[object, list[Variant | Translation]], from_end: bool = False) -> int:
        """Visit every node once, in order (or from the end), and apply the first rule that matches there."""
        nodes = list(self.gm.graph.nodes)
        self.order = {node: float(i) for i, node in enumerate(nodes)}
        self.misses.clear()
        changed = 0
        for node in reversed(nodes) if from_end else nodes:
            if node.op != "call_function" or node._erased:
                continue
            for candidate in index.get(node.target, ()):
                if self.fuel == 0:
                    return changed
                if isinstance(candidate, Translation):
                    done = self.translate(candidate, node)
                else:
                    done = self.attempt(candidate, node)
                if done:
                    changed += 1
                    break
        return changed

    def attempt(self, variant: Variant, node: fx.Node) -> bool:
        """Match a variant at a node and apply it; a miss is kept if it came far enough to be worth reading."""
        found = match(variant, node)
        if isinstance(found, Miss):
            if found.depth > 1:
                known = self.misses.get((variant.rule.name, node))
                if known is None or known.depth < found.depth:
                    self.misses[variant.rule.name, node] = found
            return False
        return self.apply(variant, found)

    def translate(self, translation: Translation, node: fx.Node) -> bool:
        """Say a torch operator in our vocabulary."""
        arguments = translation.arguments(node)
        identity = self.name_match(translation.name, node, [str(g.val(n)) for n in node.all_input_nodes])
        if isinstance(arguments, str) or identity in self.deny:
            reason = arguments if isinstance(arguments, str) else "denied"
            self.misses[translation.name, node] = Miss(1, node, reason)
            return False
        args = tuple(arguments.get(a.name, a.default_value) for a in g.schema_arguments(translation.op))
        name = g.base_name(translation.op)
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.create_node("call_function", translation.op, args, name=name)  # type: ignore[arg-type]
        self.adopt(new, node, g.Origin(translation.name, identity, _stands_for([node])), g.val(node))
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)
        self.applied(Match(identity, translation.name, g.module_path(new), g.source(new), (node.name,), (new.name,)))
        return True

    def adopt(self, new: fx.Node, old: fx.Node, origin: g.Origin, value: object) -> None:
        """Give a new node its provenance, its value and its place in the order."""
        g.copy_provenance(new, old)
        new.meta["origin"] = origin
        g.set_val(new, value)
        self.order[new] = self.order[old]

    def applied(self, done: Match) -> None:
        """Tell, count, and burn fuel."""
        base = done.id.split("~")[0]
        self.ids[base] = self.ids.get(base, 0) + 1
        emit(self.observers, Matched(done))
        if self.fuel is not None:
            self.fuel -= 1

    # ------------------------------------------------------------------------------------------- applying

    def apply(self, variant: Variant, binding: Binding) -> bool:
        """Replace a match; False, with a refusal kept, if it must not be."""
        outputs = [binding.nodes[p] for p in variant.pattern.outputs if isinstance(p, Part)]
        anchor = outputs[0]
        identity = self.identify(variant.rule, binding, anchor)
        for value, number in binding.assumed:
            torch_private.specialise(value, number)
        reason = "denied" if identity in self.deny else self.unsafe(variant, binding)
        place = None if reason else self.place(binding, outputs)
        if place is None:
            reason = reason or "something that it reads is computed only after its result is used"
            self.misses[variant.rule.name, anchor] = Miss(len(binding.nodes), anchor, reason)
            return False
        replaced = [n for p, n in binding.nodes.items() if not p.leaf]
        origin = g.Origin(variant.rule.name, identity, _stands_for(replaced))
        with self.gm.graph.inserting_before(place):
            new = self.instantiate(variant, binding, outputs, origin)
        added = tuple(n.name for n in new if isinstance(n, fx.Node))
        for old, fresh in zip(outputs, new, strict=True):
            if isinstance(fresh, fx.Node):
                old.replace_all_uses_with(fresh)
        for node in sorted(replaced, key=lambda n: -self.order[n]):
            if not node.users:
                self.gm.graph.erase_node(node)
        self.applied(Match(identity, origin.rule, g.module_path(anchor), g.source(anchor), origin.replaced, added))
        return True

    def unsafe(self, variant: Variant, binding: Binding) -> str:
        """Why the match must not be applied although it fits; checked again right before the edit."""
        if any(n._erased for n in binding.nodes.values()):
            return "another rewrite has replaced a part of it"
        outside = outside_reader(variant, binding)
        if outside is not None:
            return outside[1]
        for leaf in binding.leaves.values():
            if isinstance(leaf, fx.Node) and leaf.meta.get("keep") and any(g.is_mutable(u.target) for u in leaf.users):
                return f"{leaf.name} is written in place by an operator that has no pure form"
        return ""

    def place(self, binding: Binding, outputs: list[fx.Node]) -> fx.Node | None:
        """Where the new nodes go: after all they read, before all that reads them; None if there is no such place."""
        reads = [v for v in (*binding.leaves.values(), *binding.names.values(), *binding.carried.values())]
        last = max((self.order[n] for n in reads if isinstance(n, fx.Node) and n in self.order), default=-1.0)
        first = min(outputs, key=self.order.__getitem__)
        if last < self.order[first]:
            return first
        inside = set(binding.nodes.values())
        readers = [u for n in outputs for u in n.users if u not in inside]
        after = min(readers, key=self.order.__getitem__, default=None)
        if after is not None and last < self.order[after]:
            return after
        return None

    def identify(self, rule: Rule, binding: Binding, anchor: fx.Node) -> str:
        """A stable id: rule @ module path # structural hash (~ ordinal, where one module has several)."""
        shapes = [f"{n}:{[str(s) for s in g.shape(v)]}" for n, v in binding.leaves.items() if isinstance(v, fx.Node)]
        names = [f"{n}={g.number(v) if not isinstance(v, str) else v}" for n, v in binding.names.items()]
        return self.name_match(rule.name, anchor, [*shapes, *names])

    def name_match(self, rule: str, anchor: fx.Node, about: list[str]) -> str:
        """A match's id from its rule, its place and what is known about it."""
        digest = hashlib.sha1(";".join(about).encode(), usedforsecurity=False).hexdigest()[:6]
        base = f"{rule}@{g.module_path(anchor) or '-'}#{digest}"
        ordinal = self.ids.get(base, 0)
        return f"{base}~{ordinal + 1}" if ordinal else base

    # ------------------------------------------------------------------------------------------ templates

    def instantiate(
        self, variant: Variant, binding: Binding, outputs: list[fx.Node], origin: g.Origin
    ) -> list[object]:
        """The replacement's nodes, made from its template by substitution."""
        made: dict[Part, object] = {}
        anchor = outputs[0]
        side = variant.replacement
        results = {p: old for p, old in zip(side.outputs, outputs, strict=True) if isinstance(p, Part)}

        def argument(value: object) -> object:
            if isinstance(value, Part):
                return binding.leaves[value.leaf] if value.leaf else made[value]
            if isinstance(value, tuple):
                return [argument(v) for v in value]
            if isinstance(value, Symbolic):
                return self.number(value, binding)
            if isinstance(value, Parameter):
                return binding.names[value.name]
            return value

        for part in side.parts:
            if part.leaf:
                continue
            args = [argument(a) for a in part.args]
            kwargs = {k: argument(v) for k, v in part.kwargs.items()}
            args, kwargs = _carry(part.target, args, kwargs, binding.carried)
            if part.target is aten.reshape.default and part not in results:
                made[part] = self.reshaped(args, anchor, origin)
                continue
            node = self.gm.graph.create_node(
                "call_function",
                part.target,  # type: ignore[arg-type]  # a call's target is callable
                tuple(args),  # type: ignore[arg-type]  # what a template holds are arguments
                kwargs,  # type: ignore[arg-type]  # as above
                name=g.base_name(part.target),
            )
            made[part] = node
            old = results.get(part)
            value = g.val(old) if old is not None else self.value(part, node, side.parts, results)
            self.adopt(node, anchor, origin, value)
        return [argument(p) for p in side.outputs]

    def reshaped(self, args: list[object], anchor: fx.Node, origin: g.Origin) -> fx.Node:
        """A template's reshape in canonical form: of the first tensor of a chain, and none where it changes nothing."""
        x, sizes = args
        while g.is_call(x, aten.reshape.default):
            x = x.args[0]  # type: ignore[union-attr]  # a call
        assert isinstance(x, fx.Node) and isinstance(sizes, list)
        have = [g.expression(s) for s in g.shape(x)]
        if len(have) == len(sizes) and all(g.equal(a, g.number(b)) for a, b in zip(have, sizes, strict=True)):
            return x
        node = self.gm.graph.create_node("call_function", aten.reshape.default, (x, sizes), name="reshape")  # type: ignore[arg-type]
        self.adopt(node, anchor, origin, fake_result(node))
        return node

    def value(self, part: Part, node: fx.Node, parts: Iterable[Part], results: Mapping[Part, fx.Node]) -> object:
        """The abstract value of a template's inner node: from the outputs it feeds, else by running it on fakes."""
        picks = {p.args[1]: results[p] for p in parts if p.target is operator.getitem and p.args[0] is part and p in results}
        if picks and isinstance(node.target, torch._ops.OpOverload) and len(picks) == len(node.target._schema.returns):
            return tuple(g.val(picks[i]) for i in sorted(picks))  # type: ignore[type-var]  # indices are ints
        return fake_result(node)

    def number(self, value: Symbolic, binding: Binding) -> object:
        """A scalar of the replacement: the bound literal or node, or arithmetic on what is bound."""
        if value.is_name:
            return self.bound_number(binding.names[value.names[0]], binding)
        plain = evaluate(value, binding.names)
        if isinstance(plain, (int, float)):
            return plain
        return self.arithmetic(ast.parse(value.text, mode="eval").body, binding)

    def bound_number(self, bound: object, binding: Binding) -> object:
        """What a name is bound to as an argument: sizes become the node that holds them."""
        expr = g.expression(bound)
        if isinstance(bound, fx.Node) or isinstance(expr, (int, float, str)):
            return bound if isinstance(bound, fx.Node) else expr
        if expr not in self.sizes:
            self.sizes[expr] = self.size_node(expr, bound, binding)
        return self.sizes[expr]

    def size_node(self, expr: object, size: object, binding: Binding) -> fx.Node:
        """A node that holds a symbolic size: an input that is it, else the size of a tensor that has it."""
        for node in g.placeholders(self.gm.graph):
            if g.number(node) == expr:
                return node
        for leaf in binding.leaves.values():
            if not isinstance(leaf, fx.Node):
                continue
            for i, have in enumerate(g.shape(leaf)):
                if g.expression(have) == expr:
                    node = self.gm.graph.create_node("call_function", aten.sym_size.int, (leaf, i))
                    g.set_val(node, size)
                    return node
        raise RuntimeError(f"no tensor of the match has the size {expr}")

    def arithmetic(self, tree: ast.expr, binding: Binding) -> object:
        """An expression of bound names as nodes: `scale * factor` where both are graph values."""
        if isinstance(tree, ast.Name):
            return self.bound_number(binding.names[tree.id], binding)
        if isinstance(tree, ast.Constant):
            return tree.value
        if not isinstance(tree, ast.BinOp):
            raise RuntimeError(f"a replacement computes {ast.unparse(tree)}; only + - * / // on names are supported")
        function = ARITHMETIC[type(tree.op)]
        left, right = self.arithmetic(tree.left, binding), self.arithmetic(tree.right, binding)
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return function(left, right)
        node = self.gm.graph.create_node("call_function", function, (left, right))  # type: ignore[arg-type]  # numbers
        g.set_val(node, function(g.operand(left), g.operand(right)))
        return node

    # ------------------------------------------------------------------------------------------- reporting

    def report_misses(self) -> None:
        """Tell the misses of the last sweep, the nearest first."""
        nearest = sorted(self.misses.items(), key=lambda item: -item[1].depth)[:KEPT_MISSES]
        for (name, _), miss in nearest:
            node = miss.node
            emit(
                self.observers,
                Refused(Refusal(name, node.name, g.module_path(node), g.source(node), miss.reason, miss.depth)),
            )


def fake_result(node: fx.Node) -> object:
    """A call's abstract value, by running it on its arguments' abstract values; adds no guard."""
    values = [g.val(n) for n in node.all_input_nodes]
    mode = torch_private.fake_mode_of(values) or torch_private.fake_mode_of([g.val(n) for n in node.graph.nodes])
    if mode is None:
        mode = torch_private.new_fake_mode()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), g.val)  # type: ignore[arg-type]  # values, not nodes
    with torch_private.no_dispatch_of(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call's target is callable


def _stands_for(replaced: Iterable[fx.Node]) -> tuple[str, ...]:
    """The captured nodes behind the replaced ones: a rewrite of a rewrite stands for what the first one stood for."""
    names: dict[str, None] = {}
    for node in replaced:
        before = g.origin(node)
        names.update(dict.fromkeys((*(before.replaced if before else ()), node.name)))
    return tuple(names)


def _carry(
    target: object, args: list[object], kwargs: dict[str, object], carried: Mapping[str, object]
) -> tuple[list[object], dict[str, object]]:
    """Fill the carried arguments of our ops in a template."""
    if not g.is_ours(target):
        return args, kwargs
    schema = g.schema_arguments(target)  # type: ignore[arg-type]  # an OpOverload

    def fill(value: object) -> object:
        if not isinstance(value, Carried):
            return value
        default = next(a.default_value for a in schema if a.name == value.name)
        return carried.get(value.name, default)

    return [fill(a) for a in args], {k: fill(v) for k, v in kwargs.items()}
