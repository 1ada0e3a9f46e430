"""Wrong versions of a canonical graph: each differs from it in one place, as a model that is not it does.

mutants(gm) -> (what was changed, graph). A mutant that no longer runs is no model and is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from graphopt import graph as g
from graphopt.rewrite import fake_result

aten = torch.ops.aten

# What people confuse: each operator with others that take the same arguments.
SIBLINGS: dict[object, tuple[object, ...]] = {
    aten.add.Tensor: (aten.sub.Tensor,),
    aten.sub.Tensor: (aten.add.Tensor,),
    aten.mul.Tensor: (aten.div.Tensor,),
    aten.div.Tensor: (aten.mul.Tensor,),
    aten.rsqrt.default: (aten.sqrt.default, aten.reciprocal.default),
    aten.sqrt.default: (aten.rsqrt.default,),
    aten.tanh.default: (aten.sigmoid.default, aten.erf.default),
    aten.sigmoid.default: (aten.tanh.default,),
    aten.erf.default: (aten.tanh.default,),
    aten.neg.default: (aten.abs.default,),
    aten.relu.default: (aten.silu.default,),
    aten.mean.dim: (aten.sum.dim_IntList,),
    aten.softmax.int: (aten.log_softmax.int,),
}


def mutants(
    gm: fx.GraphModule, among: Callable[[fx.Node], bool] = lambda node: True
) -> Iterator[tuple[str, fx.GraphModule]]:
    """Every mutant that runs on the graph's abstract values; `among`: of these nodes alone."""
    for i, node in enumerate(gm.graph.nodes):
        if node.op != "call_function" or not among(node):
            continue
        changes = (*_literals(node), *_operands(node), *_siblings(node), *_dropped(node), *_inserted(node))
        for label, change in changes:
            graph = g.copy_graph(gm.graph)
            change(list(graph.nodes)[i])
            mutant = fx.GraphModule(gm, graph)
            mutant.meta.update(gm.meta)
            if _revalued(mutant.graph):
                yield f"{node.name} {label}", mutant


def read_outside(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """For each inner value: the graph that also returns it."""
    returned = set(g.output_node(gm.graph).all_input_nodes)
    for i, node in enumerate(gm.graph.nodes):
        if node.op != "call_function" or node in returned or not g.is_tensor(node):
            continue
        graph = g.copy_graph(gm.graph)
        out, inner = g.output_node(graph), list(graph.nodes)[i]
        out.args = ((*out.args[0], inner),)  # type: ignore[misc]  # a graph returns a tuple
        mutant = fx.GraphModule(gm, graph)
        mutant.meta["output_strides"] = ()
        yield node, mutant


Change = tuple[str, Callable[[fx.Node], None]]


def _literals(node: fx.Node) -> Iterator[Change]:
    """Each number, flag, dtype and size is another one; neighbours in each list change places."""
    leaves = list(_paths((node.args, node.kwargs)))
    for path, value in leaves:
        if isinstance(value, bool):
            yield f"{path} = {not value}", _setter(path, not value)
        elif isinstance(value, int):
            for other in (value + 1, value - 1, -value):
                if other != value:
                    yield f"{path} = {other}", _setter(path, other)
        elif isinstance(value, float):
            for other in (value * 1.5, -value):
                yield f"{path} = {other}", _setter(path, other)
        elif isinstance(value, torch.dtype):
            yield f"{path} = float16", _setter(path, torch.float16)
        elif isinstance(value, list) and not any(isinstance(v, fx.Node) for v in value):
            for j in range(len(value) - 1):
                swapped = [*value[:j], value[j + 1], value[j], *value[j + 2 :]]
                yield f"{path} = {swapped}", _setter(path, swapped)


def _operands(node: fx.Node) -> Iterator[Change]:
    """Two tensor operands change places; an operand is another tensor of the same shape from further up."""
    places = [(path, v) for path, v in _paths((node.args, node.kwargs)) if g.is_tensor(v)]
    for (p, a), (q, b) in itertools.combinations(places, 2):
        if a is not b:

            def swap(new: fx.Node, p: Path = p, q: Path = q) -> None:
                one, two = _get(new, p), _get(new, q)
                _setter(p, two)(new)
                _setter(q, one)(new)

            yield f"{p} and {q} swapped", swap
    before = list(itertools.takewhile(lambda n: n is not node, node.graph.nodes))
    position = {n: j for j, n in enumerate(node.graph.nodes)}
    for path, value in places:
        alike = [n for n in before if n is not value and g.is_tensor(n) and _alike(n, value)]
        for other in alike[:3]:

            def rewire(new: fx.Node, path: Path = path, j: int = position[other]) -> None:
                _setter(path, list(new.graph.nodes)[j])(new)

            yield f"{path} is {other.name}", rewire


def _siblings(node: fx.Node) -> Iterator[Change]:
    for sibling in SIBLINGS.get(node.target, ()):

        def replace(new: fx.Node, sibling: object = sibling) -> None:
            new.target = sibling  # type: ignore[assignment]  # callable

        yield f"is {sibling}", replace


def _dropped(node: fx.Node) -> Iterator[Change]:
    """The node is gone: its readers read one of its operands."""
    for j, operand in enumerate(node.all_input_nodes):
        if g.is_tensor(operand):
            yield f"is {operand.name}", lambda new, j=j: new.replace_all_uses_with(new.all_input_nodes[j])


def _inserted(node: fx.Node) -> Iterator[Change]:
    """One more step after the node."""

    def negate(new: fx.Node) -> None:
        with new.graph.inserting_after(new):
            extra = new.graph.call_function(aten.neg.default, (new,))
        new.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)

    if g.is_tensor(node):
        yield "negated", negate


# ------------------------------------------------------------------------------------------- places in a call

Path = tuple[object, ...]  # (0, i, …) in args, (1, name, …) in kwargs


def _paths(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Every argument and every element of a list argument, with its place."""
    items: Sequence[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    if len(path) >= 2:
        yield path, list(value) if isinstance(value, (list, tuple)) else value
    for key, item in items:
        yield from _paths(item, (*path, key))


def _get(node: fx.Node, path: Path) -> object:
    found: object = (node.args, node.kwargs)
    for key in path:
        found = found[key]  # type: ignore[index]  # a path of this very node
    return found


def _setter(path: Path, value: object) -> Callable[[fx.Node], None]:
    """An edit that puts a value at a place."""

    def placed(at: object, rest: Path) -> object:
        if not rest:
            return value
        if isinstance(at, dict):
            return {k: placed(v, rest[1:]) if k == rest[0] else v for k, v in at.items()}
        new = [placed(v, rest[1:]) if j == rest[0] else v for j, v in enumerate(at)]  # type: ignore[arg-type, var-annotated]
        return tuple(new) if isinstance(at, tuple) else new

    def change(node: fx.Node) -> None:
        args, kwargs = placed((node.args, dict(node.kwargs)), path)  # type: ignore[misc]  # a pair, as given
        node.args, node.kwargs = args, kwargs

    return change


def _alike(a: fx.Node, b: object) -> bool:
    return isinstance(b, fx.Node) and g.same_shape(g.shape(a), g.shape(b)) and g.dtype(a) == g.dtype(b)


def _revalued(graph: fx.Graph) -> bool:
    """Compute the abstract values again; False where the graph does not run."""
    for node in graph.nodes:
        if node.op == "call_function":
            try:
                g.set_val(node, fake_result(node))
            except Exception:  # whatever an operator says to arguments that it does not take
                return False
    return True
