"""Draw small canonical graphs by hand: inputs, named weights, calls with abstract values and places."""

from collections.abc import Callable

import torch
from torch import fx

from graphopt.graph import Origin, set_val, val
from graphopt.torch_private import new_fake_mode


class Sketch:
    """`s = Sketch(); x = s.input("x", 2, 7); y = s.call(aten.neg.default, x); gm = s.done(y)`."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = new_fake_mode(symbolic=True)

    def input(self, name: str, *shape: object, dtype: torch.dtype = torch.float32) -> fx.Node:
        """A tensor input."""
        node = self.graph.placeholder(name)
        with self.mode:
            set_val(node, torch.empty(shape, dtype=dtype))
        return node

    def weight(self, name: str, *shape: int, tied: tuple[str, ...] = ()) -> fx.Node:
        """A named weight."""
        node = self.input(name.replace(".", "_"), *shape)
        node.meta["weight"] = (name, *tied)
        return node

    def call(
        self,
        target: Callable[..., object],
        *args: object,
        path: str = "",
        source: str = "",
        origin: Origin | None = None,
        name: str | None = None,
        **kwargs: object,
    ) -> fx.Node:
        """One call; its abstract value is computed."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)  # type: ignore[arg-type]
        with self.mode:
            set_val(node, target(*fx.node.map_arg(args, val), **fx.node.map_arg(kwargs, val)))
        node.meta |= {"module_path": path, "source": source}
        if origin is not None:
            node.meta["origin"] = origin
        return node

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        """The graph, checked."""
        self.graph.output(outputs)
        self.graph.lint()
        return fx.GraphModule(torch.nn.Module(), self.graph)
