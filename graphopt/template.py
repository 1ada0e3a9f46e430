"""Instantiate a rule's replacement in a graph: its template's nodes, with what the match bound in place."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.binding import Binding, evaluate
from graphopt.rule import Carried, Parameter, Part, Side, Symbolic
from graphopt.torch_private import OpOverload

aten = torch.ops.aten
ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Template:
    """One replacement about to be made.

    Attributes:
        place: the new nodes go right before this one.
        outputs: the nodes that the replacement's outputs stand in for; the new ones have their values.
        adopt: gives a new node its provenance (that of the old output that it stands for, if any) and its
            abstract value.
    """

    graph: fx.Graph
    side: Side
    binding: Binding
    place: fx.Node
    outputs: Sequence[fx.Node]
    adopt: Callable[[fx.Node, fx.Node | None, object], None]

    def instantiate(self) -> list[object]:
        """Make the nodes; returns what stands for each output: a node, or a literal."""
        made: dict[Part, object] = {}
        binding, side = self.binding, self.side
        results = {p: old for p, old in zip(side.outputs, self.outputs, strict=True) if isinstance(p, Part)}

        def argument(value: object) -> object:
            if isinstance(value, Part):
                return binding.leaves[value.leaf] if value.leaf else made[value]
            if isinstance(value, tuple):
                return [argument(v) for v in value]
            if isinstance(value, Symbolic):
                return self.number(value)
            if isinstance(value, Parameter):
                return binding.names[value.name]
            return value

        with self.graph.inserting_before(self.place):
            for part in side.parts:
                if part.leaf:
                    continue
                args = [argument(a) for a in part.args]
                kwargs = {k: argument(v) for k, v in part.kwargs.items()}
                if g.is_ours(part.target):
                    args, kwargs = _carry(part.target, args, kwargs, binding.carried)
                if part.target in VIEWS and part not in results:
                    made[part] = VIEWS[part.target](self, args)
                    continue
                if part.target is aten.logical_not.default and part not in results and _negated(args[0]):
                    made[part] = args[0].args[0]  # type: ignore[attr-defined]  # a node
                    continue
                node = self.call(part.target, args, kwargs)
                old = results.get(part)
                self.adopt(node, old, g.val(old) if old is not None else self.value(part, node, results))
                made[part] = node
        return [argument(p) for p in side.outputs]

    def call(
        self, target: object, args: Sequence[object], kwargs: Mapping[str, object] | None = None
    ) -> fx.Node:
        """One call at the current place."""
        name = g.base_name(target)
        return self.graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name=name)  # type: ignore[arg-type]  # what a template holds are arguments

    def reshaped(self, args: Sequence[object]) -> fx.Node:
        """A template's reshape in canonical form: of a chain's first tensor, none where nothing changes."""
        x, sizes = args
        while isinstance(x, fx.Node) and g.is_call(x, aten.reshape.default):
            x = x.args[0]
        assert isinstance(x, fx.Node) and isinstance(sizes, list)
        if _has_sizes(x, sizes):
            return x
        return self.view(aten.reshape.default, x, sizes)

    def permuted(self, args: Sequence[object]) -> fx.Node:
        """A template's permutation in canonical form: permutations compose, the identity goes."""
        x, dims = args
        assert isinstance(x, fx.Node) and isinstance(dims, list)
        if g.is_call(x, aten.permute.default):
            dims, x = [x.args[1][d] for d in dims], x.args[0]  # type: ignore[index]  # a list of ints
        assert isinstance(x, fx.Node)
        return x if dims == list(range(len(dims))) else self.view(aten.permute.default, x, dims)

    def expanded(self, args: Sequence[object]) -> fx.Node:
        """A template's expand; none where the sizes are those that are there."""
        x, sizes = args
        assert isinstance(x, fx.Node) and isinstance(sizes, list)
        if _has_sizes(x, sizes):
            return x
        return self.view(aten.expand.default, x, sizes, implicit=False)

    def view(self, target: OpOverload, x: fx.Node, how: list[object], **kwargs: object) -> fx.Node:
        """A call of a view with its own abstract value."""
        node = self.call(target, (x, how), kwargs)
        self.adopt(node, None, fake_result(node))
        return node

    def value(self, part: Part, node: fx.Node, results: Mapping[Part, fx.Node]) -> object:
        """An inner node's abstract value: from the outputs that it feeds, else by running it on fakes."""
        picks: dict[int, fx.Node] = {}
        for p in self.side.parts:
            if p.target is operator.getitem and p.args[0] is part and p in results:
                assert isinstance(p.args[1], int)
                picks[p.args[1]] = results[p]
        if picks and isinstance(node.target, OpOverload) and len(picks) == len(node.target._schema.returns):
            return tuple(g.val(picks[i]) for i in sorted(picks))
        return fake_result(node)

    # --------------------------------------------------------------------------------------------- scalars

    def number(self, value: Symbolic) -> object:
        """A scalar of the replacement: the bound literal or node, or arithmetic on what is bound."""
        names = self.binding.names
        if value.is_name:
            return self.bound_number(names[value.names[0]])
        plain = evaluate(value, names)
        if isinstance(plain, (int, float)):
            return plain
        return self.arithmetic(ast.parse(value.text, mode="eval").body)

    def bound_number(self, bound: object) -> object:
        """What a name is bound to as an argument: sizes become the node that holds them."""
        expr = g.expression(bound)
        if isinstance(bound, fx.Node):
            return bound
        return expr if isinstance(expr, (int, float, str)) else self.size_node(expr, bound)

    def size_node(self, expr: object, size: object) -> fx.Node:
        """A node that holds a symbolic size: an input that is it, else the size of a tensor that has it."""
        for node in g.placeholders(self.graph):
            if g.number(node) == expr:
                return node
        for leaf in self.binding.leaves.values():
            if not isinstance(leaf, fx.Node):
                continue
            for i, have in enumerate(g.shape(leaf)):
                if g.expression(have) == expr:
                    return self.known_size(leaf, i, size)
        raise RuntimeError(f"no tensor of the match has the size {expr}")

    def known_size(self, tensor: fx.Node, dim: int, size: object) -> fx.Node:
        """sym_size(tensor, dim): one that stands before the place already, or a new one."""
        for user in tensor.users:
            if g.is_call(user, aten.sym_size.int) and user.args[1] == dim and user < self.place:
                return user
        node = self.call(aten.sym_size.int, (tensor, dim))
        g.set_val(node, size)
        return node

    def arithmetic(self, tree: ast.expr) -> object:
        """An expression of bound names as nodes: `scale * factor` where both are graph values."""
        if isinstance(tree, ast.Name):
            return self.bound_number(self.binding.names[tree.id])
        if isinstance(tree, ast.Constant):
            return tree.value
        if not isinstance(tree, ast.BinOp):
            raise RuntimeError(
                f"a replacement computes {ast.unparse(tree)}; only + - * / // on names are supported"
            )
        function = ARITHMETIC[type(tree.op)]
        left, right = self.arithmetic(tree.left), self.arithmetic(tree.right)
        if not isinstance(left, fx.Node) and not isinstance(right, fx.Node):
            return function(left, right)
        node = self.graph.create_node("call_function", function, (left, right))  # type: ignore[arg-type]  # numbers
        g.set_val(node, function(g.operand(left), g.operand(right)))
        return node


VIEWS: Mapping[object, Callable[[Template, Sequence[object]], fx.Node]] = {
    aten.reshape.default: Template.reshaped,
    aten.permute.default: Template.permuted,
    aten.expand.default: Template.expanded,
}


def fake_result(node: fx.Node) -> object:
    """A call's abstract value, by running it on its arguments' abstract values; adds no guard."""
    values = [g.val(n) for n in node.all_input_nodes]
    mode = torch_private.fake_mode_of(values) or torch_private.fake_mode_of(
        [g.val(n) for n in node.graph.nodes]
    )
    if mode is None:
        mode = torch_private.new_fake_mode()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), g.val)  # type: ignore[arg-type]  # values, not nodes
    with torch_private.no_dispatch_of(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call's target is callable


def _has_sizes(x: fx.Node, sizes: Sequence[object]) -> bool:
    """Whether these sizes, as arguments, are those that a tensor has."""
    have = [g.expression(s) for s in g.shape(x)]
    return len(have) == len(sizes) and all(g.equal(a, g.number(b)) for a, b in zip(have, sizes, strict=True))


def _negated(x: object) -> bool:
    """Whether x is `~y` of booleans: its negation is y itself."""
    return (
        isinstance(x, fx.Node)
        and g.is_call(x, aten.logical_not.default)
        and isinstance(x.args[0], fx.Node)
        and g.dtype(x.args[0]) == torch.bool
    )


def _carry(
    target: object, args: list[object], kwargs: dict[str, object], carried: Mapping[str, object]
) -> tuple[list[object], dict[str, object]]:
    """Fill the carried arguments of one of our ops in a template."""
    schema = g.schema_arguments(target)

    def fill(value: object) -> object:
        if not isinstance(value, Carried):
            return value
        default = next(a.default_value for a in schema if a.name == value.name)
        return carried.get(value.name, default)

    return [fill(a) for a in args], {k: fill(v) for k, v in kwargs.items()}
