"""Append one call to a graph, with its abstract value and the place in the source that it stands for."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphopt.graph import copy_provenance, origin, set_val
from graphopt.rewrite import fake_result


def insert_call(
    graph: fx.Graph, like: fx.Node, target: Callable[..., object], *args: object, **kwargs: object
) -> fx.Node:
    """A call at the graph's insertion point. Its value is computed on fakes and adds no guard."""
    new = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]  # nodes and plain values
    copy_provenance(new, like)
    made_by = origin(like)
    if made_by is not None:
        new.meta["origin"] = made_by
    set_val(new, fake_result(new))
    return new
