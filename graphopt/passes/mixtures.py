"""Mixtures of experts beyond the rules: lists of experts become one op; rows skip what has no share in them.

y + mlp_0(x) * r[:, 0:1] + mlp_1(x) * r[:, 1:2] + …        ->  y + experts(x, None, r, stack, stack)
experts(x, None, f(scatter(fill, -1, ids, w)), …)           ->  experts(x, ids, f(w), …)   where f(fill) is 0
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.ledger import Call
from graphopt.observe import Matched, Refused, emit
from graphopt.passes.expert_choice import nowhere, path_of, silent
from graphopt.passes.expert_lists import ExpertList, find_lists
from graphopt.passes.expert_terms import at
from graphopt.rewrite import DENIED, Match, Refusal, fake_result

if TYPE_CHECKING:
    from graphopt.pipeline import Context

aten = torch.ops.aten
EXPERTS = ops.experts.overload
LIST, CHOICE = "expert_list", "expert_choice"


def read_mixtures(gm: fx.GraphModule, ctx: Context) -> int:
    """Gather lists of experts, then leave out what is given no share; how many were changed.

    The caller recompiles the module.
    """
    made = _Mixtures(gm.graph, ctx)
    for found in find_lists(gm.graph):
        if isinstance(found, ExpertList):
            made.gather(found)
        else:
            made.refuse(LIST, *found)
    for node in list(gm.graph.nodes):
        if g.is_call(node, EXPERTS) and g.arg(node, "ids") is None and g.arg(node, "routing") is not None:
            made.choose(node)
    if made.done:
        drop_size_checks(gm.graph)
        g.eliminate_dead_code(gm.graph)
    return made.done


@dataclass
class _Mixtures:
    graph: fx.Graph
    ctx: Context
    done: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------- lists

    def gather(self, found: ExpertList) -> None:
        """Replace a list by one op on its stacked weights."""
        first, out = found.experts[0], found.out
        weights = g.weight_only(self.graph)
        linears = [n for mlp in found.experts for n in (*mlp.ups, mlp.down)]
        given = [a for n in linears for a in n.args[1:] if isinstance(a, fx.Node)]
        late = next((n for n in given if n not in weights), None)
        if late is not None:
            self.refuse(LIST, out, f"{late.name} does not depend on weights alone")
            return
        identity = self.allowed(LIST, out, [str(len(found.experts)), *map(str, first.form)])
        if identity is None:
            return
        leaves = {*given, found.rows.x, found.rows.routing}
        leaves |= {n for n in (found.rows.ids, found.base) if n is not None}
        before = self.ctx.ledger.took(_between(out, leaves)) if self.ctx.ledger else ()
        new = _Maker(self.graph, out, g.Origin(LIST, identity, tuple(n.name for n in linears)))
        with self.graph.inserting_before(out):
            width, inner = (g.shape(at(first.down, 1))[i] for i in (0, 1))
            ups = [at(n, 1) for mlp in found.experts for n in mlp.ups]
            gate_up = new.stack(ups, len(found.experts), g.shape(at(first.ups[0], 1))[1])
            down = new.stack([at(mlp.down, 1) for mlp in found.experts], len(found.experts), inner)
            up_bias = new.biases([n for mlp in found.experts for n in mlp.ups], len(found.experts))
            down_bias = new.biases([mlp.down for mlp in found.experts], len(found.experts))
            rows = found.rows
            x, routing = new.flat(rows.x, g.shape(rows.x)[-1]), rows.routing
            if g.dtype(x) != g.dtype(gate_up):
                x = new.call(aten.to.dtype, x, g.dtype(gate_up), False, False, None)
            if rows.ids is None:
                ids, routing = None, new.flat(routing, len(found.experts))
            else:
                chosen = g.shape(rows.ids)[-1]
                ids, routing = new.flat(rows.ids, chosen), new.flat(routing, chosen)
            y = new.call(
                EXPERTS, x, ids, routing, gate_up, down, first.kind, first.gated, False, up_bias, down_bias,
                None, 0.0, False, None, None,
            )  # fmt: skip
            like = rows.routing if rows.ids is None else rows.ids
            lead = [new.size(like, i) for i in range(g.rank(out) - 1)]
            y = y if g.rank(out) == 2 else new.call(aten.reshape.default, y, [*lead, width])
            if found.base is not None:
                y = new.call(aten.add.Tensor, found.base, y, alpha=1)
            if g.dtype(y) != g.dtype(out):
                y = new.call(aten.to.dtype, y, g.dtype(out), False, False, None)
        self.replace(LIST, identity, out, y, before, (find_lists, _Mixtures.gather))

    # --------------------------------------------------------------------------------------- choices

    def choose(self, node: fx.Node) -> None:
        """Give rows only to the experts that have a share in them."""
        routing = at(node, 2)
        if g.is_call(routing, aten.reshape.default) and g.shape(at(routing, 0))[-1] == g.shape(routing)[-1]:
            routing = at(routing, 0)  # one row for each of several dimensions
        path = path_of(routing)
        if path is None:
            return  # each row has a share in every expert, as far as anybody sees
        reason = nowhere(path) or silent(node)
        if reason is not None:
            self.refuse(CHOICE, node, reason)
            return
        scatter, *steps = path
        ids, share = at(scatter, 2), at(scatter, 3)
        identity = self.allowed(CHOICE, node, [str(g.shape(ids)), *(g.op_name(step) for step in steps)])
        if identity is None:
            return
        leaves = {n for n in node.all_input_nodes if n is not at(node, 2)}
        leaves |= {ids, share, *(n for step in steps for n in step.all_input_nodes if n not in path)}
        before = self.ctx.ledger.took(_between(node, leaves)) if self.ctx.ledger else ()
        new = _Maker(self.graph, node, g.Origin(CHOICE, identity, (node.name,)))
        with self.graph.inserting_before(node):
            inner = scatter
            for step in steps:
                args = [share if a is inner else new.of_chosen(a, inner, ids) for a in step.args]
                share, inner = new.call(step.target, *args, **step.kwargs), step
            if g.rank(ids) != 2:
                chosen = g.shape(ids)[-1]
                ids, share = new.flat(ids, chosen), new.flat(share, chosen)
            y = new.call(EXPERTS, node.args[0], ids, share, *node.args[3:])
        self.replace(CHOICE, identity, node, y, before, (path_of, nowhere, silent, _Mixtures.choose))

    # --------------------------------------------------------------------------------------- editing

    def allowed(self, rule: str, node: fx.Node, about: Sequence[str]) -> str | None:
        """A stable id: rule @ module # hash of what it is (~ ordinal); None where it must not be applied."""
        digest = hashlib.sha1(";".join(about).encode(), usedforsecurity=False).hexdigest()[:6]
        base = f"{rule}@{g.module_path(node) or '-'}#{digest}"
        ordinal = self.seen[base] = self.seen.get(base, 0) + 1
        identity = base if ordinal == 1 else f"{base}~{ordinal}"
        if identity in self.ctx.deny or self.ctx.fuel == 0:
            self.refuse(rule, node, "denied" if self.ctx.fuel != 0 else "no fuel left", DENIED)
            return None
        return identity

    def replace(
        self,
        rule: str,
        identity: str,
        old: fx.Node,
        new: fx.Node,
        before: tuple[Call, ...],
        functions: tuple[Callable[..., object], ...],
    ) -> None:
        """Put a value in another's place, and tell."""
        old.replace_all_uses_with(new)
        match = Match(identity, rule, g.module_path(old), g.source(old), (old.name,), (new.name,))
        if self.ctx.ledger:
            self.ctx.ledger.rewrote(match, functions, before, ((old, new),))
        emit(self.ctx.observers, Matched(match))
        self.done += 1
        if self.ctx.fuel is not None:
            self.ctx.fuel -= 1

    def refuse(self, rule: str, node: fx.Node, reason: str, guard: str = "") -> None:
        """Tell why something stays as it is."""
        path = g.module_path(node)
        told = Refusal(rule, node.name, path, g.source(node), reason, 2, "", "", guard, node.name, path)
        emit(self.ctx.observers, Refused(told))


@dataclass
class _Maker:
    """Makes calls that stand for a node, where the graph inserts."""

    graph: fx.Graph
    like: fx.Node
    origin: g.Origin

    def call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        """A call with its provenance and value."""
        name = g.base_name(target)
        new = self.graph.create_node("call_function", target, args, kwargs, name=name)  # type: ignore[arg-type]  # nodes and literals
        g.copy_provenance(new, self.like)
        new.meta["origin"] = self.origin
        g.set_val(new, fake_result(new))
        return new

    def size(self, x: fx.Node, dim: int) -> object:
        """A size as an argument: the literal, or a node that holds it."""
        size = g.shape(x)[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, x, dim)

    def flat(self, x: fx.Node, last: object) -> fx.Node:
        """x as a matrix with rows of that length."""
        if g.rank(x) == 2:
            return x
        return self.call(aten.reshape.default, x, [-1, last])

    def stack(self, weights: Sequence[fx.Node], experts: int, width: object) -> fx.Node:
        """Weights [n, k], one or more of each expert, as one [experts, rows, k]."""
        whole = self.call(aten.cat.default, list(weights), 0)
        return self.call(aten.reshape.default, whole, [experts, -1, width])

    def biases(self, linears: Sequence[fx.Node], experts: int) -> fx.Node | None:
        """The linears' biases as one [experts, n], or None where they have none."""
        if linears[0].args[2] is None:
            return None
        whole = self.call(aten.cat.default, [at(n, 2) for n in linears], 0)
        return self.call(aten.reshape.default, whole, [experts, -1])

    def of_chosen(self, argument: object, routing: fx.Node, ids: fx.Node) -> object:
        """An operand that has a number for every expert, of the chosen ones alone; others as they are."""
        if not isinstance(argument, fx.Node) or not g.is_tensor(argument):
            return argument
        if not g.same_shape(g.shape(argument), g.shape(routing)):
            return argument
        return self.call(aten.gather.default, argument, -1, ids, sparse_grad=False)


# ------------------------------------------------------------------------------------------- what is left


def _between(out: fx.Node, leaves: set[fx.Node]) -> list[fx.Node]:
    """The calls that lead from some nodes to another one."""
    found: dict[fx.Node, None] = {}
    todo = [out]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and node not in leaves and node not in found:
            found[node] = None
            todo += node.all_input_nodes
    return list(found)


def drop_size_checks(graph: fx.Graph) -> None:
    """Assertions that where(x) has 0 .. x's number of elements as rows go: they hold of every x."""
    for node in list(graph.nodes):
        check = node.args[0] if g.is_call(node, aten._assert_scalar.default) else None
        if isinstance(check, fx.Node) and _holds(check):
            graph.erase_node(node)
            if not check.users:
                graph.erase_node(check)


def _holds(check: fx.Node) -> bool:
    """Whether a comparison is true of every where: 0 <= rows, rows <= size."""
    if not g.is_call(check, operator.ge, operator.le) or not g.is_call(check.args[0], aten.sym_size.int):
        return False
    place, bound = at(at(check, 0), 0), check.args[1]
    if not g.is_call(place, operator.getitem) or not g.is_call(at(place, 0), aten.where.default):
        return False
    if check.target is operator.ge:
        return isinstance(bound, int) and bound <= 0
    sizes = [s for s in g.shape(at(at(place, 0), 0)) if isinstance(s, int)]
    whole = len(sizes) == g.rank(at(at(place, 0), 0))
    return whole and isinstance(bound, int) and bound >= math.prod(sizes)
