"""A graph as readable numbered text: one line a node, what made it, and identical layers folded into one."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.graph import (
    flat_arguments,
    is_call,
    is_weight,
    module_path,
    op_name,
    origin,
    schema_arguments,
    source,
    val,
    weight_names,
)

MOST_ALIKE = 64  # how often a call may occur in one layer for the layer still to be found
COMMENT_COLUMN = 72  # where the remarks begin; longer calls push them to the right

SHORT_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def listing(graph: fx.Graph, *, fold_layers: bool = False) -> str:
    """The graph as text, ending in a newline.

    One line a node: `%12 rms_norm = rms_norm(%3, w:model.norm.weight, 1e-06)  # [2,7,48] bf16  model.norm`:
    number, name, call (arguments that have their default value are left out), shape and dtype, module path,
    the rule that made it, source line. `w:name` is a weight, `c:name` a constant.

    With `fold_layers`, consecutive blocks that differ only in the integers of their module paths and weight
    names are printed once, under a line `x 31: model.layers.1 .. model.layers.31`. Blocks are equal if their
    calls, literals, shapes and wiring are; only the first may read other values of the same shape than the
    later ones (it reads the embedding, they read their predecessor).
    """
    nodes = list(graph.nodes)
    number_of = {node: i for i, node in enumerate(nodes)}

    def refer(node: fx.Node) -> str:
        return by_name(node) if is_weight(node) or node.op == "get_attr" else f"%{number_of[node]}"

    lines = [
        line(node, refer) if is_weight(node) or node.op == "output" else f"%{i} {line(node, refer)}"
        for i, node in enumerate(nodes)
    ]
    if not fold_layers:
        return "\n".join(lines) + "\n"
    folded: list[str] = []
    at = 0
    for block in repeated_blocks(nodes):
        folded += lines[at : block.start]
        folded.append(f"x {block.times}: {block.first} .. {block.last}")
        folded += [f"  {text}" for text in lines[block.start : block.start + block.period]]
        at = block.start + block.period * block.times
    return "\n".join(folded + lines[at:]) + "\n"


def by_name(node: fx.Node) -> str:
    """A node as an argument: `w:name` for a weight, `c:name` for a constant, else `%` and its name."""
    names = weight_names(node)
    if names:
        return f"w:{names[0]}"
    return f"c:{node.target}" if node.op == "get_attr" else f"%{node.name}"


def line(node: fx.Node, refer: Callable[[fx.Node], str] = by_name) -> str:
    """One node as text, without its number; `refer` spells the other nodes that it reads."""
    names = weight_names(node)
    if names:
        tied = f" tied to {', '.join(names[1:])}" if names[1:] else ""
        left = f"w:{names[0]} = weight{tied}"
    elif node.op == "output":
        left = f"return {literal(node.args[0], refer)}"
    else:
        left = f"{node.name} = {call(node, refer)}"
    made_by = origin(node)
    remarks = [
        describe(val(node)),
        module_path(node),
        made_by.rule if made_by else "",
        source(node).split(" ", 1)[0].rsplit("/", 1)[-1],
    ]
    about = "  ".join(remark for remark in remarks if remark)
    return f"{left:<{COMMENT_COLUMN}}  # {about}" if about else left


def call(node: fx.Node, refer: Callable[[fx.Node], str] = by_name) -> str:
    """`aten.softmax.int(%3, -1)`: a node's call; arguments that have their default value are left out."""
    if node.op == "placeholder":
        return "input"
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    target, name = node.target, op_name(node)
    if not schema_arguments(target):
        parts = [literal(a, refer) for a in node.args]
        return f"{name}({', '.join(parts + [f'{k}={literal(v, refer)}' for k, v in node.kwargs.items()])})"
    overload = str(target).rpartition(".")[2]
    if overload != "default":
        name = f"{name}.{overload}"
    return f"{name}({', '.join(_given(node, refer))})"


def _given(node: fx.Node, refer: Callable[[fx.Node], str]) -> list[str]:
    """The arguments to print: required ones by position, others by name unless they are defaults."""
    parts: list[str] = []
    for i, argument in enumerate(schema_arguments(node.target)):
        if i < len(node.args):
            value = node.args[i]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            continue
        text = literal(value, refer)
        if argument.has_default_value() and _equal(value, argument.default_value):
            continue
        named = argument.has_default_value() or argument.kwarg_only
        parts.append(f"{argument.name}={text}" if named else text)
    return parts


def _equal(value: object, default: object) -> bool:
    if isinstance(value, (list, tuple)) or isinstance(default, (list, tuple)):
        return repr(value) == repr(default)
    return type(value) is type(default) and value == default


def literal(value: object, refer: Callable[[fx.Node], str] = by_name) -> str:
    """An argument as text: a node by `refer`, a dtype as `bf16`, anything else as Python spells it."""
    if isinstance(value, fx.Node):
        return refer(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(literal(v, refer) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v, refer)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return short_dtype(value)
    if isinstance(value, torch.device):
        return f"'{value}'"
    return str(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else repr(value)


def short_dtype(dtype: torch.dtype) -> str:
    """`bf16` for torch.bfloat16; torch's own name where there is no short one."""
    return SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def describe(value: object) -> str:
    """An abstract value as text: `[2,7,48] bf16`, `s0 + 1`, or several in parentheses; empty for None."""
    if isinstance(value, torch.Tensor):
        place = "" if value.device.type == "cpu" else f" {value.device}"
        return f"[{','.join(str(s) for s in value.shape)}] {short_dtype(value.dtype)}{place}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe(v) for v in value)})"
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ folding


@dataclass(frozen=True)
class Block:
    """`times` equal runs of `period` nodes from `start` on; `first` and `last` name the outer two."""

    start: int
    period: int
    times: int
    first: str
    last: str


def template(path: str) -> str:
    """A module path or weight name with its integers blanked: equal for corresponding parts of two layers."""
    return re.sub(r"\d+", "#", path)


def repeated_blocks(nodes: Sequence[fx.Node]) -> tuple[Block, ...]:
    """The longest runs of consecutive identical layers, from left to right without overlap; see `listing`."""
    facts = _Facts(nodes)
    places: dict[object, list[int]] = {}
    for i, token in enumerate(facts.tokens):
        places.setdefault(token, []).append(i)
    found: list[Block] = []
    at = 0
    while at < len(nodes):
        again = places[facts.tokens[at]]
        following = again[bisect_right(again, at) :][:MOST_ALIKE]
        runs = [(times, j - at) for j in following if (times := facts.times(at, j - at)) > 1]
        # The widest run wins; of those the one of the smallest layer.
        times, period = max(runs, key=lambda run: (run[0] * run[1], -run[1]), default=(1, 1))
        first, last = facts.ends(at, period, times)
        if first != last and period * (times - 1) > 1:  # its title is a line too
            found.append(facts.at_its_border(Block(at, period, times, first, last)))
            at = found[-1].start
        at += times * period
    return tuple(found)


class _Facts:
    """What the comparison of two blocks needs of each node, computed once."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.number_of = {node: i for i, node in enumerate(nodes)}
        self.labels = [_label(n) for n in nodes]
        self.tokens = [
            (n.op, call(n, lambda _: "%") if is_call(n) else "", describe(val(n)), template(label))
            for n, label in zip(nodes, self.labels, strict=True)
        ]
        self.reads = [[self.number_of[r] for r in flat_arguments(n) if isinstance(r, fx.Node)] for n in nodes]
        self.leaf = [n.op in ("placeholder", "get_attr") for n in nodes]

    def times(self, start: int, period: int) -> int:
        """How many blocks of `period` nodes from `start` on are alike; 1 where the second differs."""
        count = 1
        while start + (count + 1) * period <= len(self.tokens) and self._alike(start, period, count):
            count += 1
        return count

    def _alike(self, start: int, period: int, block: int) -> bool:
        """Whether block number `block` is as the one before it."""
        begin = start + block * period
        return all(
            self.tokens[i] == self.tokens[i - period] and self._wired_alike(i, begin, period, block)
            for i in range(begin, begin + period)
        )

    def _wired_alike(self, i: int, begin: int, period: int, block: int) -> bool:
        """Same inner edges; outer ones advance evenly: by 0 (the mask), a period (the layer before), ..."""
        here, before = self.reads[i], self.reads[i - period]
        if len(here) != len(before):
            return False
        for k, (new, old) in enumerate(zip(here, before, strict=True)):
            if self.leaf[new] and self.leaf[old]:
                if self.tokens[new] != self.tokens[old]:
                    return False
            elif new >= begin or old >= begin - period:  # inside its block: at the same place of it
                if (new >= begin) != (old >= begin - period) or new - old != period:
                    return False
            elif block == 1:
                if self.tokens[new][2] != self.tokens[old][2] or not self._plausible(i, k, begin, period):
                    return False
            elif new - old not in (0, period, old - self.reads[i - 2 * period][k]):
                return False
        return True

    def _plausible(self, i: int, k: int, begin: int, period: int) -> bool:
        """Whether the second block may read this: as the first does, of it, or as the third goes on."""
        new, old = self.reads[i][k], self.reads[i - period][k]
        if new == old or begin - period <= new < begin:
            return True
        third = self.reads[i + period] if i + period < len(self.reads) else []
        return k < len(third) and third[k] - new == new - old

    def at_its_border(self, block: Block) -> Block:
        """The run moved right, by less than a layer, to where each of its blocks is most of one layer."""
        best, most = block, 0
        for start in range(block.start, block.start + block.period):
            if start > block.start and self.times(start, block.period) < block.times:
                break
            first, last = self.ends(start, block.period, block.times)
            inside = sum(
                f"{self.labels[i]}.".startswith(f"{first}.") for i in range(start, start + block.period)
            )
            if first != last and inside > most:
                best, most = Block(start, block.period, block.times, first, last), inside
        return best

    def ends(self, start: int, period: int, times: int) -> tuple[str, str]:
        """The first and last block's names: the shortest label that moves, cut after its moving integer."""
        far = (times - 1) * period
        block = range(start, start + period)
        moving = [
            (self.labels[i], self.labels[i + far]) for i in block if self.labels[i] != self.labels[i + far]
        ]
        if not moving:  # without module paths, the weights say it
            edges = [edge for i in block for edge in zip(self.reads[i], self.reads[i + far], strict=True)]
            leaves = [(self.labels[a], self.labels[b]) for a, b in edges if self.leaf[a] and self.leaf[b]]
            moving = [(a, b) for a, b in leaves if a != b]
        if not moving:
            return "", ""
        first, last = min(moving, key=lambda pair: len(pair[0]))
        same = next(
            (i for i, (a, b) in enumerate(zip(first.split("."), last.split("."), strict=False)) if a != b), 0
        )
        return ".".join(first.split(".")[: same + 1]), ".".join(last.split(".")[: same + 1])


def _label(node: fx.Node) -> str:
    """What places a node in a layer: a weight's or an input's name, else its module path."""
    names = weight_names(node)
    if names:
        return names[0]
    return str(node.target) if node.op in ("placeholder", "get_attr") else module_path(node)
