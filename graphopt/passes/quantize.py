"""Quantize: linears read their weights in 8 bits; activations stay as they are.

linear(x, W, b)   ->   s = scales_int8(W, group); linear_int8(x, pack_int8(W, s), s, b)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.errors import OptionError
from graphopt.observe import Matched, Refused, Warned, emit
from graphopt.passes.routers import routers
from graphopt.rewrite import Match, Refusal, fake_result

if TYPE_CHECKING:
    from graphopt.pipeline import Context

aten = torch.ops.aten
LINEAR = ops.linear.overload
RULE = "int8_linear"
KINDS = ("int8",)
SHOWN = 5  # an error's list of weights
# What has scales of its own dtype.
WIDE_ENOUGH = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
# What moves weights and leaves their numbers alone: it says the same of a weight and of a cast of it.
MOVES = frozenset({aten.slice.Tensor, aten.permute.default, aten.cat.default})


@dataclass(frozen=True)
class Quantize:
    """Weights of linears become int8 with a scale for each row and group of columns: weight-only, symmetric.

    Any weight that depends on weights alone: concatenated, sliced, transposed, tied. What is made of it are
    nodes on the weight, which `fold` prepares once. Kept as they are: linears whose outputs choose experts,
    linears with few weights, and what is excluded by name; an embedding is no linear, so the table of a tied
    `lm_head` stays while the head becomes int8.

    Casts of a weight are left out, also those below concatenations, slices and transposes: what is packed
    are the numbers that the model holds, with scales in their dtype, and so one int8 form serves a model
    with and without autocast. It is within half a step of the weight as it is; the rounding of a cast to a
    narrower dtype, which would come on top of it, does not happen.

    Options:
        kind: "int8".
        group: how many columns (inputs) share a scale.
        exclude: patterns (`fnmatch`) of names that are kept. A pattern is compared with each weight's names,
            with the path of the linear's module and with those of all modules around them, from any dot on:
            `lm_head`, `layers.0`, `mlp.down_proj` and `*.down_proj` work, whether names are the whole
            model's or, under regional compilation, a layer's own. What a merged linear is made of counts:
            to keep Q is to keep Q, K and V.
        least: linears of fewer weights are kept: 64 x 64 saves 12 kB, for a kernel of its own.

    Raises (before anything is changed):
        OptionError: an unknown kind; a group that does not divide the inputs of a linear.
    """

    kind: str = "int8"
    group: int = 64
    exclude: tuple[str, ...] = ()
    least: int = 4096

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"recognised"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})
    exactness: ClassVar[str] = "lossy"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"quantize has no kind {self.kind!r}; known are {', '.join(map(repr, KINDS))}")
        if type(self.group) is not int or self.group < 1:
            raise OptionError(f"quantize has group {self.group!r}; it takes a whole number, 1 or more")
        if isinstance(self.exclude, str):
            raise OptionError(
                f"quantize excludes {self.exclude!r}; it takes a tuple of names, as ('lm_head',)"
            )

    def run(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Edit `gm` in place."""
        quantizer = _Quantizer(gm.graph, self, ctx, g.weight_only(gm.graph))
        chosen = quantizer.choose()
        quantizer.require_groups(chosen)
        for node in chosen:
            quantizer.apply(node)
        gm.recompile()


def named(name: str, pattern: str) -> bool:
    """Whether a pattern means a weight or module of that name, or a module around it."""
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}") for path in around)


@dataclass
class _Quantizer:
    graph: fx.Graph
    options: Quantize
    ctx: Context
    weights: set[fx.Node]  # what depends on weights alone
    ids: dict[str, int] = field(default_factory=dict)
    packed: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)  # weight -> int8, scales
    held: dict[fx.Node, fx.Node] = field(default_factory=dict)  # weight -> the same without casts

    # --------------------------------------------------------------------------------------------- looking

    def choose(self) -> list[fx.Node]:
        """The linears to quantize, in order; the others are refused, with their reasons."""
        linears = [n for n in self.graph.nodes if g.is_call(n, LINEAR) and n not in self.weights]
        choosing = routers(self.graph)
        self.warn_of_idle_patterns(linears)
        chosen = []
        for node in linears:
            reason = choosing.get(node) or self.refuses(node)
            if reason is None:
                chosen.append(node)
            else:
                self.refuse(node, reason)
        return chosen

    def refuses(self, node: fx.Node) -> str | None:
        """Why a linear is kept."""
        weight = weight_of(node)
        if weight not in self.weights:
            return f"weight {weight.name} does not depend on weights alone"
        if not g.dtype(weight).is_floating_point:
            return f"weight {weight.name} is {g.dtype(weight)}, not floating"
        sizes = g.shape(weight)
        if not all(isinstance(size, int) for size in sizes):
            return f"weight {weight.name} has a symbolic size"
        for pattern in self.options.exclude:
            match = next((name for name in names_of(node) if named(name, pattern)), None)
            if match is not None:
                return f"{match} is excluded by {pattern!r}"
        elements = math.prod(sizes)
        return f"{elements} weights < {self.options.least}" if elements < self.options.least else None

    def warn_of_idle_patterns(self, linears: Sequence[fx.Node]) -> None:
        """Tell of patterns that nothing has the name of; a graph without linears is not worth a word."""
        names = {name for node in linears for name in names_of(node)}
        for pattern in self.options.exclude:
            if names and not any(named(name, pattern) for name in names):
                shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
                message = f"quantize: {pattern!r} excludes no linear of this graph; its names are {shown}"
                emit(self.ctx.observers, Warned(message))

    def require_groups(self, chosen: Sequence[fx.Node]) -> None:
        """Raise OptionError where the group does not divide the inputs of a linear."""
        group = self.options.group
        inputs = {n: g.shape(weight_of(n))[1] for n in chosen}
        wrong = {n: k for n, k in inputs.items() if isinstance(k, int) and k % group}
        if not wrong:
            return
        first, *others = (f"{_place(n)} with {k} inputs" for n, k in wrong.items())
        more = f" (and {len(others)} more)" if others else ""
        common = math.gcd(group, *(k for k in inputs.values() if isinstance(k, int)))
        smaller = f"group {common} divides all of them; or " if common > 1 else ""
        keep = next(iter(names_of(next(iter(wrong))))).removesuffix(".weight")
        raise OptionError(
            f"quantize: group {group} does not divide the inputs of {first}{more}; {smaller}"
            f"exclude {'them' if others else 'it'}: quantize_exclude=({keep!r},{' ...' if others else ''})"
        )

    # --------------------------------------------------------------------------------------------- editing

    def apply(self, node: fx.Node) -> None:
        """Replace one linear."""
        identity = self.identify(node)
        if identity in self.ctx.deny or self.ctx.fuel == 0:
            self.refuse(node, "denied" if identity in self.ctx.deny else "no fuel left")
            return
        x, weight, bias = node.args
        assert isinstance(weight, fx.Node)
        origin = g.Origin(RULE, identity, (node.name,))
        new: list[fx.Node] = []

        def call(target: Callable[..., object], *args: object) -> fx.Node:
            made = self.graph.call_function(target, args)  # type: ignore[arg-type]  # nodes and plain values
            g.copy_provenance(made, node)
            made.meta["origin"] = origin
            g.set_val(made, fake_result(made))
            new.append(made)
            return made

        with self.graph.inserting_before(node):
            held = self.uncast(weight, call)
            if held not in self.packed:  # a weight that several linears read is packed once
                self.packed[held] = self.pack(held, call)
            linear = call(ops.linear_int8.overload, x, *self.packed[held], bias)
        node.replace_all_uses_with(linear)
        self.graph.erase_node(node)
        if self.ctx.fuel is not None:
            self.ctx.fuel -= 1
        made = tuple(n.name for n in new)
        match = Match(identity, RULE, g.module_path(linear), g.source(linear), (node.name,), made)
        emit(self.ctx.observers, Matched(match))

    def uncast(self, weight: fx.Node, call: Callable[..., fx.Node]) -> fx.Node:
        """cat([to(W1), to(W2)])   ->   cat([W1, W2])

        The weight as the model holds it. A cast from what is not floating, or is fp8, stays: those have no
        int8 form of their own.
        """
        if weight not in self.held:
            self.held[weight] = self._uncast(weight, call)
        return self.held[weight]

    def _uncast(self, weight: fx.Node, call: Callable[..., fx.Node]) -> fx.Node:
        if not self.weights.issuperset(weight.all_input_nodes):
            return weight
        if g.is_call(weight, aten.to.dtype):
            source = weight.args[0]
            assert isinstance(source, fx.Node)
            return self.uncast(source, call) if g.dtype(source) in WIDE_ENOUGH else weight
        if not g.is_call(weight, *MOVES):
            return weight
        inputs = {node: self.uncast(node, call) for node in weight.all_input_nodes}
        if all(node is held for node, held in inputs.items()):
            return weight
        assert callable(weight.target)
        return call(weight.target, *fx.map_arg(weight.args, lambda node: inputs[node]))

    def pack(self, weight: fx.Node, call: Callable[..., fx.Node]) -> tuple[fx.Node, fx.Node]:
        """cat([W1, W2])   ->   cat([int8(W1), int8(W2)]), cat([scales(W1), scales(W2)])

        Rows are quantized each for itself, so parts come first: preparing Q, K and V takes half of their
        bytes on the way, not their concatenation's and the result's (5 / 4).
        """
        parts = _rows(weight)
        if not parts or not self.weights.issuperset(parts):
            scales = call(ops.scales_int8.overload, weight, self.options.group)
            return call(ops.pack_int8.overload, weight, scales), scales
        both = [self.pack(part, call) for part in parts]
        packed, scales = (call(aten.cat.default, [pair[i] for pair in both], 0) for i in (0, 1))
        return packed, scales

    def identify(self, node: fx.Node) -> str:
        """A stable id: rule @ module # hash of the weight's shape and the group (~ ordinal)."""
        about = f"{tuple(g.shape(weight_of(node)))}{g.dtype(weight_of(node))}/{self.options.group}"
        digest = hashlib.sha1(about.encode(), usedforsecurity=False).hexdigest()[:6]
        base = f"{RULE}@{g.module_path(node) or '-'}#{digest}"
        ordinal = self.ids[base] = self.ids.get(base, 0) + 1
        return base if ordinal == 1 else f"{base}~{ordinal}"

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Tell why a linear is kept."""
        refusal = Refusal(RULE, node.name, g.module_path(node), g.source(node), reason, 1)
        emit(self.ctx.observers, Refused(refusal))


def weight_of(node: fx.Node) -> fx.Node:
    """The weight of a linear."""
    weight = g.arg(node, "weight")
    assert isinstance(weight, fx.Node)
    return weight


def _rows(weight: fx.Node) -> list[fx.Node]:
    """What stands below each other in a concatenation; empty for any other weight."""
    if not g.is_call(weight, aten.cat.default) or g.arg(weight, "dim") not in (0,):
        return []
    parts = weight.args[0]
    assert isinstance(parts, (list, tuple))
    return [part for part in parts if isinstance(part, fx.Node)]


def names_of(node: fx.Node) -> tuple[str, ...]:
    """What a user may call a linear: the names of all that its weight is made of, its module's path."""
    names = (name for source in _sources(weight_of(node)) for name in g.weight_names(source))
    path = g.module_path(node)
    return tuple(dict.fromkeys((*names, path) if path else names))


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The weights that a value is made of, in the order in which it reads them."""
    if g.is_weight(node):
        yield node
    for read in node.all_input_nodes:
        yield from _sources(read)


def _place(node: fx.Node) -> str:
    """Where a linear is, for a message."""
    return g.module_path(node) or next(iter(names_of(node)), node.name)
