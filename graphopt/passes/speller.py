"""Builds the canonical graph: arguments by schema, equal calls once, one node for each symbolic size."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.aliasing import root, storage, viewed
from graphopt.errors import CaptureRefused
from graphopt.passes.layout import LAYOUTS
from graphopt.passes.spellings import SPELLINGS, Result

aten = torch.ops.aten

# Factories that may be merged after all: nobody writes to an arange, and a mask needs one for each side.
MERGED_FACTORIES = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})

# sympy's names of what sizes are made with -> on numbers.
ARITHMETIC: dict[str, Callable[..., object]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


@dataclass
class Speller:
    """Builds the canonical graph, one old node at a time."""

    keep_layout: bool = False
    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, Result] = field(default_factory=dict)
    known: dict[object, fx.Node] = field(
        default_factory=dict
    )  # what has been computed: common subexpressions
    sizes_known: dict[object, fx.Node] = field(
        default_factory=dict
    )  # symbolic expression -> the node that holds it
    written: list[fx.Node] = field(default_factory=list)  # inputs that have been written back
    first_write: fx.Node | None = None

    # ------------------------------------------------------------------------------------------- the walk

    def visit(self, node: fx.Node) -> None:
        """Respell one old node."""
        if node.op == "output":
            self.output(node)
        elif node.op == "get_attr":
            self.env[node] = self.constant(node)
        elif node.op != "call_function":
            new = self.graph.node_copy(node, self.argument)  # type: ignore[arg-type]  # no arguments here
            self.env[node] = self.size(new)
        else:
            self.env[node] = self.size_call(node) if _is_size(node) else self.call(node)

    def constant(self, node: fx.Node) -> fx.Node:
        """A tensor that the graph holds; `torch.tensor(0)` of each layer is one."""
        value = getattr(node.graph.owning_module, str(node.target), None)
        key: object = node.target
        if type(value) is torch.Tensor and value.numel() == 1 and not value.is_meta:
            key = ("constant", value.dtype, value.device, tuple(value.shape), argument_key(value.item()))
        if key not in self.known:
            self.known[key] = self.graph.node_copy(node)
        return self.known[key]

    def call(self, node: fx.Node) -> Result:
        """A call on tensors: by its row of the table, else with its arguments filled in."""
        args, kwargs = self.arguments(node)
        if node.target is aten.copy_.default and args[0].op == "placeholder":
            return self.write_back(node, *args[:2])
        spelling = SPELLINGS.get(node.target)
        if spelling is None or self.kept(node):
            return self.generic(node, args, kwargs)
        return spelling(self, node, args, kwargs)

    def kept(self, node: fx.Node) -> bool:
        """Whether a copy must stay a copy: functionalization needs it, or something depends on strides."""
        if node.meta.get("keep"):
            return True
        return self.keep_layout and node.target in LAYOUTS

    def size(self, new: fx.Node) -> Result:
        """An input or a size: one node for each symbolic expression, a literal where it is constant."""
        value = g.val(new)
        if not isinstance(value, (torch.SymInt, torch.SymFloat)):
            return new
        return self.sizes_known.setdefault(g.expression(value), new)

    def size_call(self, node: fx.Node) -> Result:
        """Arithmetic on sizes: a literal where it is constant, else the one node for the expression."""
        expr = g.expression(g.val(node))
        if isinstance(expr, (int, float, bool)):
            return expr
        if expr in self.sizes_known:
            return self.sizes_known[expr]
        new = self.graph.node_copy(node, self.argument)  # type: ignore[arg-type]  # fx maps literals, too
        return self.sizes_known.setdefault(expr, new)

    def write_back(self, node: fx.Node, entry: fx.Node, value: fx.Node) -> fx.Node:
        """copy_(input, value): the value may not be (a view of) an input that is written before, or of this
        one.
        """
        if root(value) in (*self.written, entry):
            value = self.private(value, node)
        new = self.emit(aten.copy_.default, (entry, value, False), {}, g.val(node), node)
        self.first_write = self.first_write or new
        self.written.append(entry)
        return new

    def output(self, node: fx.Node) -> None:
        """The outputs; two that were different memory in eager stay different memory."""
        owners: dict[fx.Node, int | None] = {n: storage(g.val(n)) for n in g.placeholders(self.graph)}
        copies: dict[int | None, fx.Node] = {}  # memory -> the copy that stands for it

        def fresh(old: fx.Node) -> object:
            new = self.argument(old)
            if not isinstance(new, fx.Node) or not g.is_tensor(new):
                return new
            source, memory = root(new), storage(g.val(old))
            if source.op != "get_attr" and owners.setdefault(source, memory) == memory:
                return new
            return self.apart(old, copies)

        new = self.graph.create_node("output", "output", fx.node.map_arg(node.args, fresh))  # type: ignore[arg-type]
        new.meta.update(node.meta)

    def apart(self, old: fx.Node, copies: dict[int | None, fx.Node]) -> Result:
        """An output in memory of its own, or of the outputs that it shared memory with in eager."""
        memory = storage(g.val(old))
        views = [old]
        while (base := viewed(views[-1])) is not None and storage(g.val(base)) == memory:
            views.append(base)
        if memory not in copies:
            value = self.argument(views[-1])
            assert isinstance(value, fx.Node)
            copies[memory] = self.private(value, views[-1])
        self.env[views[-1]] = copies[memory]
        for view in reversed(views[:-1]):
            self.env[view] = self.call(view)
        return self.env[old]

    def private(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """A copy of a value as it is before any input is written."""
        before = (
            self.graph.inserting_before(self.first_write) if self.first_write else contextlib.nullcontext()
        )
        with before:
            new = self.graph.create_node(
                "call_function", aten.clone.default, (value,), {"memory_format": None}
            )
        g.set_val(new, g.val(like))
        g.copy_provenance(new, like)
        new.meta["keep"] = True
        return new

    # ----------------------------------------------------------------------------------------- arguments

    def argument(self, old: fx.Node) -> object:
        """The canonical form of an old node as an argument."""
        return self.env[old]

    def arguments(self, node: fx.Node) -> tuple[tuple, dict[str, object]]:
        """Arguments by schema, with defaults: positional ones in `args`, keyword-only ones in `kwargs`."""
        given = [_map(a, self.env) for a in node.args]
        named = {k: _map(v, self.env) for k, v in node.kwargs.items()}
        schema = g.schema_arguments(node.target)
        args: list[object] = given
        kwargs: dict[str, object] = {}
        for i, argument in enumerate(schema):
            if argument.kwarg_only:
                kwargs[argument.name] = named.pop(argument.name, argument.default_value)
            elif i >= len(args):
                args.append(named.pop(argument.name, argument.default_value))
        return tuple(args), {**kwargs, **named}

    def generic(self, node: fx.Node, args: tuple, kwargs: dict[str, object]) -> fx.Node:
        """A call that has no row of its own: the same operator, its `dim` counted from the end."""
        schema = g.schema_arguments(node.target)
        first = next((a for a in args if g.is_tensor(a)), None)
        if first is not None and schema and schema[0].name in ("self", "input"):
            rank = max(g.rank(first), 1)
            for i, argument in enumerate(schema[: len(args)]):
                if argument.name == "dim" and args[i] is not None:
                    args = (*args[:i], _from_end(args[i], rank), *args[i + 1 :])
        return self.emit(node.target, args, kwargs, g.val(node), node)

    # ------------------------------------------------------------------------------------------ building

    def emit(
        self, target: object, args: tuple, kwargs: dict[str, object], value: object, like: fx.Node
    ) -> fx.Node:
        """A call of the canonical graph, or the equal one that is already there."""
        keep = bool(like.meta.get("keep")) and target is like.target
        key = None
        if not keep and mergeable(target):
            key = (target, argument_key(args), argument_key(tuple(kwargs.items())))
            found = self.known.get(key)
            if found is not None:
                return found
        new = self.graph.create_node("call_function", target, args, kwargs, name=like.name)  # type: ignore[arg-type]
        g.copy_provenance(new, like)
        g.set_val(new, value)
        if keep:
            new.meta["keep"] = True
        if key is not None:
            self.known[key] = new
        return new

    def reshape(self, x: fx.Node, value: object, like: fx.Node) -> fx.Node:
        """reshape(x) to a value's shape; no-op and chains removed."""
        assert isinstance(value, torch.Tensor)
        while g.is_call(x, aten.reshape.default):
            x = x.args[0]  # type: ignore[assignment]  # the first argument of a reshape is a node
        if g.same_shape(g.shape(x), tuple(value.shape)):
            return x
        return self.emit(aten.reshape.default, (x, self.sizes(value.shape)), {}, value, like)

    def permute(self, x: fx.Node, dims: Sequence[int], value: object, like: fx.Node) -> fx.Node:
        """permute(x, dims); permutations compose, the identity goes."""
        if g.is_call(x, aten.permute.default):
            inner = x.args[1]
            dims, x = [inner[d] for d in dims], x.args[0]  # type: ignore[index, misc, assignment]  # ints and a node
        if list(dims) == list(range(len(dims))):
            return x
        return self.emit(aten.permute.default, (x, list(dims)), {}, value, like)

    def slice(
        self, x: fx.Node, dim: int, start: object, end: object, step: object, value: object, like: fx.Node
    ) -> fx.Node:
        """slice(x, dim, start, end, step) with bounds inside the tensor where they are known."""
        assert isinstance(value, torch.Tensor)
        size, rank = g.shape(x)[dim], g.rank(x)
        start = 0 if start is None else start
        if step == 1 and g.same_size(size, value.shape[dim]):
            return x
        if isinstance(size, int) and isinstance(start, int) and (end is None or isinstance(end, int)):
            start, end, _ = slice(start, end, 1).indices(size)
        elif end is None or (isinstance(end, int) and end >= 2**62):
            end = self.sizes([size])[0]
        elif step == 1 and start == 0 and isinstance(end, int) and end < 0:
            end = self.sizes([value.shape[dim]])[0]  # x[:-1] of a symbolic size: its own length
        return self.emit(aten.slice.Tensor, (x, dim - rank, start, end, step), {}, value, like)

    def cast(self, x: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        """to.dtype(x, dtype), or x where it has that dtype."""
        if g.dtype(x) == dtype:
            return x
        value = g.val(like)
        if (
            not isinstance(value, torch.Tensor)
            or not g.same_shape(tuple(value.shape), g.shape(x))
            or value.dtype != dtype
        ):
            old = g.tensor(x)
            assert old is not None
            value = old.new_empty(old.shape, dtype=dtype)
        return self.emit(aten.to.dtype, (x, dtype, False, False, None), {}, value, like)

    def sizes(self, shape: Sequence[g.Size]) -> list[object]:
        """A shape as arguments: literals, and for symbolic sizes the node that holds the expression."""
        return [self.size_argument(g.expression(size), size) for size in shape]

    def size_argument(self, expr: object, size: object) -> object:
        """The node that holds a symbolic size; made from a tensor that has it, or by arithmetic."""
        if isinstance(expr, (int, float)):
            return expr
        if expr in self.sizes_known:
            return self.sizes_known[expr]
        for node in self.graph.nodes:
            if g.is_call(node, aten.repeat_interleave.self_int, aten.repeat.default):
                continue  # its size is a product of others: reading it there would keep the copy alive
            for i, have in enumerate(g.shape(node) if g.is_tensor(node) else ()):
                if g.expression(have) == expr:
                    new = self.graph.create_node("call_function", aten.sym_size.int, (node, i))
                    g.set_val(new, have)
                    return self.sizes_known.setdefault(expr, new)
        return self.arithmetic(expr, size)

    def arithmetic(self, expr: object, size: object) -> fx.Node:
        """A symbolic size that no tensor has yet, computed from its parts: `s0 * 4`, `s0 + s1`, `s0 // 2`.

        Raises:
            CaptureRefused: it is made by arithmetic that is not known here.
        """
        name = type(expr).__name__
        if name not in ARITHMETIC:
            raise CaptureRefused(f"the size {expr} has no node and no known arithmetic ({name})")
        parts = [self.size_argument(g.plain(a), None) for a in expr.args]  # type: ignore[attr-defined]  # a sympy expression
        result = parts[0]
        for part in parts[1:]:
            new = self.graph.create_node("call_function", ARITHMETIC[name], (result, part))  # type: ignore[arg-type]  # numbers
            g.set_val(new, ARITHMETIC[name](g.operand(result), g.operand(part)))
            result = new
        assert isinstance(result, fx.Node)
        if size is not None:
            g.set_val(result, size)
        return self.sizes_known.setdefault(expr, result)


def _is_size(node: fx.Node) -> bool:
    return node.target in g.SIZE_OPS and isinstance(
        g.val(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def mergeable(target: object) -> bool:
    """Whether two equal calls of it are one."""
    if target in MERGED_FACTORIES:
        return True
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch_private.OpOverload)
        and not g.is_mutable(target)
        and not g.is_random(target)
        and not g.is_factory(target)
        and bool(target._schema.returns)
    )


def _map(argument: object, env: dict[fx.Node, Result]) -> object:
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_map(a, env) for a in argument)
    return argument


def _from_end(dim: object, rank: int) -> object:
    if isinstance(dim, int):
        return dim % rank - rank
    if isinstance(dim, (list, tuple)) and all(isinstance(d, int) for d in dim):
        return [d % rank - rank for d in dim]
    return dim


def argument_key(argument: object) -> object:
    """A hashable stand-in for an argument: 1, 1.0 and True are three."""
    if isinstance(argument, (list, tuple)):
        return tuple(argument_key(a) for a in argument)
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, (float, complex)):
        return (type(argument), repr(argument))  # 0.0 and -0.0 are two, too
    return (type(argument), argument)
