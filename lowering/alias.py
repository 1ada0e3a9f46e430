"""Which nodes may share memory with a value: what in-place execution and kept weights have to look at."""

from __future__ import annotations

import operator

from torch import fx

from graphopt.graph import arg, is_mutable, schema_arguments


def views_argument(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call's result may be (a view of) this argument: by its schema; `getitem` picks from it."""
    if user.op != "call_function":
        return False
    if user.target is operator.getitem:
        return True
    schema = schema_arguments(user.target)
    aliased = [a.name for a in schema if a.alias_info is not None]
    return any(_holds(arg(user, name), node) for name in aliased)


def _holds(argument: object, node: fx.Node) -> bool:
    return argument is node or (isinstance(argument, (list, tuple)) and node in argument)


def family(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """The node and everything that may be a view of it, or of a view of it; not through `without`."""
    found, todo = {node}, [node]
    while todo:
        seen = todo.pop()
        for user in seen.users:
            if user not in found and user is not without and views_argument(user, seen):
                found.add(user)
                todo.append(user)
    return found


def readers(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """All nodes that read the node's memory, itself or through views; plain views are not among them."""
    views = family(node, without)
    found = {user for view in views for user in view.users if user not in views or is_mutable(user.target)}
    return found - {without}


def escapes(node: fx.Node) -> bool:
    """Whether a value's memory is returned to the caller or written: it must then be the caller's own."""
    return any(user.op == "output" or is_mutable(user.target) for user in readers(node))
