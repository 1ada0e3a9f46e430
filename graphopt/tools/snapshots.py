"""Copies of a graph as it was after each pass."""

from __future__ import annotations

from torch import fx

from graphopt.observe import Event, PassEnded, PassStarted

CAPTURED = "captured"  # the stage before the first pass


class Snapshots:
    """Keeps a copy of the graph before the first pass and after each pass: `graphs["recognise"]`."""

    def __init__(self) -> None:
        self.graphs: dict[str, fx.GraphModule] = {}

    def on_event(self, event: Event) -> None:
        """Copy the graph of a pass's end, and of the first pass's start."""
        if isinstance(event, PassStarted) and not self.graphs:
            self.graphs[CAPTURED] = snapshot(event.gm)
        if isinstance(event, PassEnded):
            self.graphs[event.name] = snapshot(event.gm)


def snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with the same node names, metadata and constants; later edits of `gm` do not reach it."""
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    graph.output(value).meta = dict(output.meta)
    return fx.GraphModule(gm, graph)
