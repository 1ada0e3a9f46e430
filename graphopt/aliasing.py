"""What shares memory with what, and what a call writes: read off schemas and off the fake tensors of the
trace.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt import graph as g

aten = torch.ops.aten

# Views of another dtype.
REINTERPRETS = frozenset(
    {
        aten.view.dtype,
        aten.view_as_complex.default,
        aten.view_as_real.default,
        aten.real.default,
        aten.imag.default,
    }
)
# Written by their schema, yet they only return their argument.
ALIAS_ONLY = frozenset({aten.detach_.default})


def storage(value: object) -> int | None:
    """The identity of the storage behind a fake tensor, or behind all pieces of a split; equal storages
    alias.
    """
    if isinstance(value, torch.Tensor):
        return value.untyped_storage()._cdata
    if isinstance(value, (list, tuple)) and value:
        keys = {storage(v) for v in value}
        return keys.pop() if len(keys) == 1 else None
    return None


def writes(node: fx.Node) -> bool:
    """Whether a node is a call that writes to an argument."""
    return node.op == "call_function" and g.is_mutable(node.target) and node.target not in ALIAS_ONLY


def written_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that a call writes, each once, by its schema; lists are opened."""
    found: dict[fx.Node, None] = {}
    if writes(node):
        for argument in g.schema_arguments(node.target):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = g.arg(node, argument.name)
                several = given if isinstance(given, (list, tuple)) else (given,)
                found.update(dict.fromkeys(n for n in several if isinstance(n, fx.Node)))
    return tuple(found)


def viewed(node: object) -> fx.Node | None:
    """The argument that a call's result may be (a view of), by its schema; None where the result is new
    memory.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or not node.args:
        return None
    if (
        node.target is operator.getitem
    ):  # of a split's views; the outputs of any other call are memories of their own
        source = node.args[0]
        return source if isinstance(source, fx.Node) and viewed(source) is not None else None
    for argument in g.schema_arguments(node.target):
        if argument.alias_info is not None:
            given = g.arg(node, argument.name)
            return given if isinstance(given, fx.Node) and not _casts(node, given) else None
    return None


def _casts(node: fx.Node, source: fx.Node) -> bool:
    """Whether a result has another dtype than what it might be a view of: then it is a copy, but for
    what reinterprets bits.
    """
    both = g.is_tensor(node) and g.is_tensor(source)
    return both and node.target not in REINTERPRETS and g.dtype(node) != g.dtype(source)


def root(node: fx.Node) -> fx.Node:
    """What a value may be a view of, through all views: an input, a constant or the call that made the
    memory.
    """
    while (source := viewed(node)) is not None:
        node = source
    return node


def written_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The placeholders that some call writes, directly or through a view."""
    keys = {storage(g.val(n)) for node in graph.nodes for n in written_arguments(node)} - {None}
    return {n for n in g.placeholders(graph) if storage(g.val(n)) in keys}
