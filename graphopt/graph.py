"""Read and build fx graphs: the only file that touches `node.meta["val"]` and operator schemas."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

Size: TypeAlias = "int | torch.SymInt"
Value: TypeAlias = "torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool | None"
Argument: TypeAlias = "fx.node.Argument"

aten = torch.ops.aten

# Operators on sizes. They are pure and carry no tensor, so every pass may duplicate, merge or drop them.
SIZE_OPS = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.truediv,
        operator.pow,
        aten.sym_size.int,
        torch.sym_max,
        torch.sym_min,
        torch.sym_float,
        torch.sym_int,
    }
)


@dataclass(frozen=True)
class Origin:
    """Where a node that a rewrite made comes from."""

    rule: str
    match: str  # the match's stable id
    replaced: tuple[str, ...]  # names of the nodes that it stands for


# ---------------------------------------------------------------------------------------------- values


def val(node: fx.Node) -> object:
    """The node's abstract value: a fake tensor, a SymInt/SymFloat, a number, or a tuple of them."""
    return node.meta.get("val")


def set_val(node: fx.Node, value: object) -> None:
    """Record the abstract value of a node that was just made."""
    node.meta["val"] = value


def tensor(node: fx.Node) -> torch.Tensor | None:
    """The node's fake tensor, or None where it is no single tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_tensor(argument: object) -> bool:
    """Whether an argument is a node that holds one tensor."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[Size, ...]:
    """The node's sizes; each is an int, or a SymInt under dynamic shapes."""
    value = node.meta["val"]
    return tuple(value.shape)


def dtype(node: fx.Node) -> torch.dtype:
    """The node's dtype."""
    return node.meta["val"].dtype


def device(node: fx.Node) -> torch.device:
    """The node's device."""
    return node.meta["val"].device


def rank(node: fx.Node) -> int:
    """The node's number of dimensions."""
    return node.meta["val"].dim()


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal. Never adds a guard: unequal expressions count as different."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return expression(a) == expression(b)


def expression(size: object) -> object:
    """An int or float for a plain or constant value, a sympy expression for a symbolic one."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        return plain(size.node.expr)
    return size


def operand(argument: object) -> object:
    """A scalar argument as something to compute with: a number, a SymInt or a SymFloat."""
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def plain(expr: object) -> object:
    """A sympy number as Python's; any other expression as it is."""
    if getattr(expr, "is_Integer", False):
        return int(expr)  # type: ignore[call-overload]  # a sympy Integer
    if getattr(expr, "is_Float", False) or getattr(expr, "is_Rational", False):
        return float(expr)  # type: ignore[arg-type]  # a sympy number
    return expr


def equal(a: object, b: object) -> bool:
    """Whether two numbers (or sympy expressions) are known to be equal."""
    if a is b:
        return True
    if isinstance(a, (bool, str)) or isinstance(b, (bool, str)):
        return type(a) is type(b) and a == b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    import sympy

    if not isinstance(a, (int, float, sympy.Expr)) or not isinstance(b, (int, float, sympy.Expr)):
        return False
    return bool(a == b) or sympy.expand(a - b) == 0


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are known to be equal, dimension by dimension."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def number(argument: object) -> object:
    """What a scalar argument is worth: the literal, or the (symbolic) value of the node that holds it."""
    if isinstance(argument, fx.Node):
        return expression(argument.meta.get("val"))
    return expression(argument)


# ------------------------------------------------------------------------------------------------ calls


def is_call(node: object, *targets: object) -> bool:
    """Whether the node calls one of the targets (OpOverloads or functions); with none, whether it is one."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return not targets or node.target in targets


@functools.cache
def schema_arguments(target: Callable[..., object]) -> tuple[torch.Argument, ...]:
    """The arguments of an OpOverload's schema; empty for a plain function."""
    return tuple(target._schema.arguments) if isinstance(target, torch._ops.OpOverload) else ()


@functools.cache
def is_ours(target: object) -> bool:
    """Whether an operator belongs to graphopt's vocabulary."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.startswith("graphopt::")


@functools.cache
def argument_names(target: Callable[..., object]) -> tuple[str, ...]:
    """The names of an OpOverload's arguments in schema order."""
    return tuple(a.name for a in schema_arguments(target))


def arg(node: fx.Node, name: str) -> Argument:
    """The argument called `name` of an OpOverload call, its default where it is not given.

    Raises KeyError where the schema has no such argument.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    for i, argument in enumerate(schema_arguments(node.target)):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else argument.default_value
    raise KeyError(f"{node.target} has no argument {name!r}; it has {argument_names(node.target)}")


def is_mutable(target: object) -> bool:
    """Whether an operator writes to an argument: judged by its schema, not by a trailing underscore."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


@functools.cache
def is_random(target: object) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


@functools.cache
def is_factory(target: object) -> bool:
    """Whether an operator makes a new tensor from none, or from a tensor's shape alone (`zeros`, `new_ones`).

    Two equal factories are two buffers: merging a prefill graph's zeros for K and V makes them one, silently
    wrong.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name
    return (
        name.startswith(("aten::new_", "aten::empty"))
        or name.endswith("_like")
        or not any("Tensor" in str(a.type) for a in target._schema.arguments)
    )


def rms_norm_eps(dtype: torch.dtype) -> float:
    """What torch's rms_norm of that dtype adds where it is given no eps: that of the dtype it computes in.

    fp32's 1.2e-7 for half precision, too (torch 2.13 on the CPU; its documentation says x's).
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def is_pure(node: fx.Node) -> bool:
    """Whether a call may be merged with an equal one, moved or dropped: no write, no randomness."""
    if node.op != "call_function":
        return False
    if node.target in SIZE_OPS or node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_mutable(target) or is_random(target):
        return False
    return bool(target._schema.returns)  # what returns nothing is there for its effect: an assertion


def inputs(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes that the node reads, each once, in order."""
    return node.all_input_nodes


def flat_arguments(node: fx.Node) -> Iterator[object]:
    """Every leaf of args and kwargs, lists opened."""

    def leaves(x: object) -> Iterator[object]:
        if isinstance(x, (list, tuple)):
            for y in x:
                yield from leaves(y)
        else:
            yield x

    yield from leaves(node.args)
    yield from leaves(tuple(node.kwargs.values()))


# ---------------------------------------------------------------------------------------------- weights


def weight_names(node: object) -> tuple[str, ...]:
    """All names (tied weights have several) of the weight that a placeholder stands for; else empty."""
    return node.meta.get("weight", ()) if isinstance(node, fx.Node) else ()


def set_weight_names(node: fx.Node, names: tuple[str, ...]) -> None:
    """Say which names a placeholder's weight has."""
    node.meta["weight"] = names


def is_weight(node: object) -> bool:
    """Whether a node is a weight of the model: a parameter, or a buffer that the graph never writes."""
    return bool(weight_names(node))


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's placeholders in calling order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's output node."""
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def weight_only(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on weights and constants alone (weights included; constants and factories not).

    Their results may be prepared once and kept: `lowering/fold` cuts them out of what runs at each call.
    """
    known: set[fx.Node] = set()
    for node in graph.nodes:
        if is_weight(node):
            known.add(node)
        elif node.op == "call_function" and is_pure(node):
            reads = inputs(node)
            if (
                reads
                and any(n in known for n in reads)
                and all(n in known or n.op == "get_attr" for n in reads)
            ):
                known.add(node)
    return known


# ------------------------------------------------------------------------------------------------- text


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made the node, as `model.layers.0.mlp`; empty where unknown."""
    return node.meta.get("module_path", "")


def source(node: fx.Node) -> str:
    """The source line that made the node, as `modeling_llama.py:60 return self.weight * h`; or empty."""
    return node.meta.get("source", "")


def origin(node: fx.Node) -> Origin | None:
    """The rewrite that made the node, or None for a node of the captured program."""
    return node.meta.get("origin")


def base_name(target: object) -> str | None:
    """The name for a node that calls an operator: `rms_norm`, `reshape`."""
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else None


def op_name(node: fx.Node) -> str:
    """The short name of what a node does: `rms_norm`, `aten.mul`, `placeholder`."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target._schema.name.split("::")
        return name if namespace == "graphopt" else f"{namespace}.{name}"
    return getattr(node.target, "__name__", str(node.target))


# ----------------------------------------------------------------------------------------------- editing


def copy_provenance(new: fx.Node, old: fx.Node) -> None:
    """Give a new node the module path and source line of the node that it stands for."""
    for key in ("module_path", "source", "stack_trace", "nn_module_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same abstract values: `copy.deepcopy` would copy the fake tensors and their mode."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    return new


def eliminate_dead_code(graph: fx.Graph) -> int:
    """Drop calls that nobody reads and that have no effect; returns how many went."""
    dropped = 0
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr" or is_pure(node):
            graph.erase_node(node)
            dropped += 1
    return dropped


def fingerprint(graph: fx.Graph) -> str:
    """A hash of the graph's structure: operators, literals, edges, shapes and dtypes; names do not count."""
    import hashlib

    number_of: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for i, node in enumerate(graph.nodes):
        number_of[node] = i
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number_of[n]}")
        value = node.meta.get("val")
        about = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
        target = node.target if node.op == "call_function" else ""
        digest.update(f"{node.op}|{target}|{arguments}|{about}\n".encode())
    return digest.hexdigest()[:16]
