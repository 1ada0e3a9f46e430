"""Sketches for lowering and merge: symbolic sizes, constants, weights of any dtype; what a graph calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import fx

from graphopt import torch_private
from graphopt.graph import dtype, placeholders, set_val, shape, val
from graphopt.kernel import Case
from tests.sketch import Sketch


class Builder(Sketch):
    """A `Sketch` that can hold symbolic sizes (`size`), constants (`constant`) and weights of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.root = torch.nn.Module()

    def size(self, name: str, hint: int) -> fx.Node:
        """A placeholder for a symbolic size; also stands in shapes."""
        with self.among_inputs():
            node = self.graph.placeholder(name)
        set_val(node, torch_private.symbolic_int(self.mode, name, hint))
        return node

    def input(self, name: str, *shape: object, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A tensor input; its sizes are ints or nodes made by `size`."""
        with self.among_inputs():
            return super().input(name, *fx.node.map_arg(shape, val), dtype=dtype)  # type: ignore[misc]  # a tuple

    def among_inputs(self) -> contextlib.AbstractContextManager[object]:
        """Placeholders come first, whenever they are drawn."""
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if inputs:
            return self.graph.inserting_after(inputs[-1])
        first = next(iter(self.graph.nodes), None)
        return self.graph.inserting_before(first) if first is not None else contextlib.nullcontext()

    def weight(
        self, name: str, *shape: int, tied: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
    ) -> fx.Node:
        """A named weight."""
        node = self.input(name.replace(".", "_"), *shape, dtype=dtype)
        node.meta["weight"] = (name, *tied)
        return node

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A small constant that the graph owns."""
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        set_val(node, self.mode.from_tensor(value))
        return node

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        """The graph, checked; it returns a tuple."""
        self.graph.output(outputs)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)


def node_of(overload: Callable[..., object], arguments: Sequence[object]) -> fx.Node:
    """A node that calls an op on these arguments, its tensors as placeholders."""
    build = Builder()
    nodes: list[object] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            nodes.append(build.graph.placeholder(f"arg{i}"))
            set_val(nodes[-1], build.mode.from_tensor(argument, static_shapes=True))  # type: ignore[arg-type]  # a node
        else:
            nodes.append(argument)
    return build.call(overload, *nodes)


def node_of_case(overload: Callable[..., object], case: Case, dtype: torch.dtype = torch.float32) -> fx.Node:
    """A node that calls an op on a kernel's case."""
    return node_of(overload, case.make(dtype))


def targets(gm: fx.GraphModule) -> list[object]:
    """What the graph calls, in order."""
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def calls(gm: fx.GraphModule, *wanted: object) -> list[fx.Node]:
    """The nodes that call one of the targets."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in wanted]


def values(gm: fx.GraphModule) -> list[torch.Tensor]:
    """Random values for the placeholders, the same at each call."""
    torch.manual_seed(0)
    return [torch.randn(shape(n)).to(dtype(n)) for n in placeholders(gm.graph)]  # type: ignore[arg-type]  # ints
