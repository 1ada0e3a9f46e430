"""A rewrite as two Python functions, before and after: they can be pasted into a file and run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt.listing import describe
from graphopt.observe import Event, KernelChosen, Matched, PassEnded, PassStarted
from graphopt.rewrite import Match
from graphopt.tools.snapshots import snapshot
from graphopt.torch_private import OpOverload

PREAMBLE = "import operator\n\nimport torch\n\nfrom graphopt import ops\n\naten = torch.ops.aten\n"
COMMENT_COLUMN = 72


@dataclass(frozen=True)
class Functions:
    """The source of `def before(...)` and of `def after(...)`, with the same parameters."""

    before: str
    after: str

    @property
    def code(self) -> str:
        """A whole file: the imports, and both functions."""
        return f"{PREAMBLE}\n\n{self.before}\n\n{self.after}"


@dataclass
class Shower:
    """Observes a compilation and keeps the functions of the rewrites it is asked for, by their keys.

    A key is a match's id, a pass's name, or `op/kernel`.
    """

    wanted: frozenset[str]
    found: dict[str, Functions] = field(default_factory=dict)
    _gm: fx.GraphModule | None = None
    _last: fx.GraphModule | None = None
    _start: fx.GraphModule | None = None

    def on_event(self, event: Event) -> None:
        """Copy the graph before and after each rewrite; worth it only where few are applied."""
        if isinstance(event, PassStarted):
            self._gm = event.gm
            self._start = self._last = snapshot(event.gm)
        elif isinstance(event, Matched) and self._gm is not None and self._last is not None:
            now = snapshot(self._gm)
            if event.match.id in self.wanted:
                self.found.setdefault(event.match.id, of_match(self._last.graph, now.graph, event.match))
            self._last = now
        elif isinstance(event, KernelChosen) and f"{event.op}/{event.kernel}" in self.wanted:
            assert self._gm is not None
            node = next(n for n in self._gm.graph.nodes if n.name == event.node)
            self.found.setdefault(f"{event.op}/{event.kernel}", of_kernel(node, event.op))
        elif isinstance(event, PassEnded) and event.name in self.wanted and self._start is not None:
            functions = Functions(whole("before", self._start.graph), whole("after", event.gm.graph))
            self.found.setdefault(event.name, functions)


# ----------------------------------------------------------------------------------------------- what to show


def of_match(before: fx.Graph, after: fx.Graph, match: Match) -> Functions:
    """What a match replaced, and by what: both from the values that the new nodes read to those they give."""
    old, new = ({n.name: n for n in graph.nodes} for graph in (before, after))
    edited = set(match.new_nodes) & old.keys()  # changed in place
    pairs = _replaced(old, new, edited)
    fresh = _needed([b for _, b in pairs], lambda n: n.name not in old or n.name in edited)
    inputs = {n.name for node in fresh for n in node.all_input_nodes if n not in fresh}
    inner = set(match.nodes) - inputs
    gone = _needed(
        [a for a, _ in pairs],
        lambda n: n.name not in inputs and (n.name not in new or n.name in inner | edited),
    )
    inputs |= {n.name for node in gone for n in node.all_input_nodes if n not in gone}
    reads = [n for n in before.nodes if n.name in inputs] + [
        n for n in after.nodes if n.name in inputs and n.name not in old
    ]
    return Functions(
        function("before", reads, [n for n in before.nodes if n in gone], [a for a, _ in pairs]),
        function("after", reads, [n for n in after.nodes if n in fresh], [b for _, b in pairs]),
    )


def of_kernel(node: fx.Node, op: str) -> Functions:
    """ops.attention(q, k, v)   ->   kernels.attention.sdpa(q, k, v), for a node that calls the kernel."""
    reads = list(node.all_input_nodes)
    before = _definition("before", reads, [f"return ops.{op}({_arguments(node)})"])
    return Functions(before, function("after", reads, [node], [node]))


def whole(name: str, graph: fx.Graph) -> str:
    """A whole graph as a function of its placeholders and constants."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    reads = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    outputs = [x for x in g.flat_arguments(g.output_node(graph))]
    return function(name, reads, nodes, outputs)


def _replaced(
    old: dict[str, fx.Node], new: dict[str, fx.Node], edited: Collection[str]
) -> list[tuple[fx.Node, fx.Node]]:
    """(old value, new value) wherever a node that stayed reads another one than before, each once."""
    pairs: dict[str, tuple[fx.Node, fx.Node]] = {name: (old[name], new[name]) for name in edited}
    for name, node in new.items():
        if name not in old or name in edited:
            continue
        for a, b in zip(g.flat_arguments(old[name]), g.flat_arguments(node), strict=False):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.name != b.name:
                pairs.setdefault(a.name, (a, b))
    return list(pairs.values())


def _needed(outputs: Iterable[fx.Node], inside: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The outputs, and what they are computed from as far as it is inside."""
    found: set[fx.Node] = set()
    todo = [n for n in outputs if n.op == "call_function"]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [n for n in node.all_input_nodes if n.op == "call_function" and inside(n)]
    return found


# ------------------------------------------------------------------------------------------------ source text


def function(name: str, reads: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[object]) -> str:
    """def name(reads): one line a node, with its shape, then the outputs."""
    lines = []
    for node in nodes:
        text = f"{node.name} = {_call(node)}"
        about = describe(g.val(node))
        lines.append(f"{text:<{COMMENT_COLUMN}}  # {about}" if about else text)
    given = ", ".join(map(literal, outputs))
    return _definition(name, reads, [*lines, f"return {given or None}"])


def _definition(name: str, reads: Sequence[fx.Node], lines: Sequence[str]) -> str:
    about = [f"# {n.name}: {describe(g.val(n))}" for n in reads if describe(g.val(n))]
    body = "\n".join(f"    {line}" for line in (*about, *lines))
    return f"def {name}({', '.join(n.name for n in reads)}):\n{body}\n"


def _call(node: fx.Node) -> str:
    """A node's call as Python."""
    target = node.target
    if target is operator.getitem:
        return f"{literal(node.args[0])}[{literal(node.args[1])}]"
    return f"{_function_name(target)}({_arguments(node)})"


def _function_name(target: object) -> str:
    """How the function is reached from the preamble's names."""
    if isinstance(target, OpOverload):
        namespace, name = target._schema.name.split("::")
        if g.is_ours(target):
            return f"ops.{name}"
        overload = f"{name}.{target._overloadname}"
        return f"aten.{overload}" if namespace == "aten" else f"torch.ops.{namespace}.{overload}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", str(target))
    if module == "_operator":
        return f"operator.{name}"
    return f"torch.{name}" if module == "torch" else f"__import__({module!r}, fromlist=['*']).{name}"


def _arguments(node: fx.Node) -> str:
    """The arguments; at the end, those that have their default value are left out."""
    schema = g.schema_arguments(node.target)
    args = list(node.args)
    while args and len(args) <= len(schema) and _is_default(args[-1], schema[len(args) - 1]):
        args.pop()
    defaults = {a.name: a for a in schema}
    kwargs = {k: v for k, v in node.kwargs.items() if k not in defaults or not _is_default(v, defaults[k])}
    return ", ".join([*map(literal, args), *(f"{k}={literal(v)}" for k, v in kwargs.items())])


def _is_default(value: object, argument: torch.Argument) -> bool:
    if not argument.has_default_value() or isinstance(value, fx.Node):
        return False
    return type(value) is type(argument.default_value) and value == argument.default_value


def literal(value: object) -> str:
    """An argument as Python: a node by its name, dtypes and devices by torch's."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(literal, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"float({str(value)!r})"
    return repr(value)
