"""Find experts in a list: a sum of MLPs, each on linears of its own, weighted by its column of the routing.

    y = 0; y = y + mlp_0(x) * routing[:, 0:1]; …            every expert on every row; or
    rows, places = where(ids == e); y.index_add_(0, rows, mlp_e(x[rows]) * routing[rows, places, None])

Pure: graphs are read, never edited. How many experts there are no equation can say: this is no rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes.expert_terms import (
    Mlp,
    Rows,
    Term,
    at,
    chosen_once,
    dense_term,
    listed,
    operands,
    taken_term,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpertList:
    """A whole list: the sum, its experts by their numbers, and what they are added to besides."""

    out: fx.Node
    rows: Rows
    experts: tuple[Mlp, ...]
    base: fx.Node | None


def find_lists(graph: fx.Graph) -> list[ExpertList | tuple[fx.Node, str]]:
    """Every list of two experts or more; or its last node, and why its terms are no list of experts."""
    found: list[ExpertList | tuple[fx.Node, str]] = []
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in seen or node.op != "call_function":
            continue
        terms, base, links = _terms(node)
        seen.update(links)
        if len(terms) > 1:
            whole = _whole(node, terms, base, links)
            found.append((node, whole) if isinstance(whole, str) else whole)
    return found[::-1]


def _whole(
    out: fx.Node, terms: Sequence[Term], base: fx.Node | None, links: Sequence[fx.Node]
) -> ExpertList | str:
    """The terms as one list, or what is wrong with them."""
    terms = sorted(terms, key=lambda term: term.number)
    rows, first = terms[0].rows, terms[0].mlp
    numbers = [term.number for term in terms]
    if any(term.rows != rows for term in terms):
        return "its experts read other rows or other routing weights"
    if numbers != list(range(len(terms))):
        return f"its experts are {numbers}, not each of 0 .. {len(terms) - 1} once"
    if not g.dtype(rows.routing).is_floating_point:
        return f"{rows.routing.name}, the routing weights, are {g.dtype(rows.routing)}"
    if rows.ids is None and g.shape(rows.routing)[-1] != len(terms):
        return f"{g.shape(rows.routing)[-1]} routing weights for {len(terms)} experts"
    different = next((t.mlp.down for t in terms if t.mlp.form != first.form), None)
    if different is not None:
        return f"{different.name} is of an expert of another form than {first.down.name}"
    if rows.once and not (rows.ids is not None and chosen_once(rows.ids)):
        return "nothing says that a row chooses an expert once only"
    lead = g.shape(rows.routing if rows.ids is None else rows.ids)[:-1]
    if not g.same_shape(g.shape(out), (*lead, g.shape(first.down)[-1])):
        return f"{out.name} has another shape than its experts' rows"
    inside = {*links, *(n for term in terms for n in term.inside)}
    for node in sorted(inside - {out}):
        outside = next((u for u in node.users if u not in inside), None)
        if outside is not None:
            return f"{node.name} is also used by {outside.name}"
    if base is not None and fill_of(base) == 0:
        base = None
    if base is not None and not g.same_shape(g.shape(base), g.shape(out)):
        return f"{base.name}, to which they are added, has another shape"
    return ExpertList(out, rows, tuple(term.mlp for term in terms), base)


def _terms(out: fx.Node) -> tuple[list[Term], fx.Node | None, list[fx.Node]]:
    """The terms of a sum, the last first, what it starts from, and the nodes that add."""
    terms: list[Term] = []
    links: list[fx.Node] = []
    node = out
    while (step := _last(node)) is not None:
        term, adding, node = step
        terms += [term] if term else []
        links += adding
    first = dense_term(node) if terms else None
    return ([*terms, first], None, links) if first else (terms, node, links)


def _last(node: fx.Node) -> tuple[Term | None, list[fx.Node], fx.Node] | None:
    """The last term of a sum, the nodes that add it, and what it is added to."""
    if g.is_call(node, aten.add.Tensor) and isinstance(node.args[0], fx.Node) and node.args[1] == 0:
        return None, [node], node.args[0]
    for term, rest in operands(node, aten.add.Tensor):
        if found := dense_term(term):
            return found, [node], rest
    if not g.is_call(node, aten.index_add.default, aten.index_put.default) or g.rank(node) != 2:
        return None
    rest = at(node, 0)
    if node.target is aten.index_add.default:
        fits = node.args[1] in (0, -2) and g.arg(node, "alpha") == 1
        added = taken_term(node.args[2], node.args[3], once=False) if fits else None
        return (added, [node], rest) if added else None
    rows = listed(node.args[1])
    if len(rows) != 1:
        return None
    if g.arg(node, "accumulate"):
        added = taken_term(rows[0], node.args[2], once=False)
        return (added, [node], rest) if added else None
    for read, term in operands(node.args[2], aten.add.Tensor):  # y[rows] = y[rows] + term
        same = g.is_call(read, aten.index.Tensor) and at(read, 0) is rest and listed(read.args[1]) == rows
        if same and (added := taken_term(rows[0], term, once=True)):
            return added, [node, at(node, 2), read], rest
    return None


def fill_of(node: fx.Node) -> float | None:
    """The value of a tensor that is new and holds one everywhere."""
    if g.is_call(node, aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default):
        return 0.0
    if g.is_call(node, aten.full_like.default, aten.full.default, aten.new_full.default):
        fill = g.arg(node, "fill_value")
        return float(fill) if isinstance(fill, (int, float)) else None
    return None
