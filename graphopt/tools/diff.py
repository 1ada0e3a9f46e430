"""What changed between two graphs: rewrites with their rule's name, single edits, identical layers once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from torch import fx

from graphopt.graph import module_path, source, val, weight_names
from graphopt.listing import by_name, call, describe, literal, template
from graphopt.tools.align import Alignment, Sameness, align, reads, skeleton

if TYPE_CHECKING:
    from rich.text import Text

COMMENT_COLUMN = 64
COLOURS = {"-": "red", "+": "green", "~": "yellow", "@": "bold cyan"}


class HasGraph(Protocol):
    """Anything that holds a graph in `gm`, as `graphopt.capture` returns it."""

    @property
    def gm(self) -> fx.GraphModule: ...


@dataclass(frozen=True)
class Hunk:
    """One change, and all the places where it happened in the same way.

    A rewrite has its rule's name, the nodes that it took away and those that it made. Any other edit has an
    empty `rule`. `changed` holds (before, after) of nodes that stayed, with other arguments or another type.
    """

    rule: str
    places: tuple[str, ...]  # module paths, one for each time it happened
    matches: tuple[str, ...]  # the rewrites' ids, in the order of `places`
    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        times = len(self.places)
        first, last = self.places[0] or "(no module)", self.places[-1] or "(no module)"
        place = first if first == last else f"{first} .. {last}"
        title = f"@@ {place}" + (f"  x {times}" if times > 1 else "")
        if self.rule:
            title += f"  {self.rule}: {_number(len(self.removed), 'node')} -> {len(self.added)}"
        lines = [title, *(f"- {text}" for text in self.removed), *(f"+ {text}" for text in self.added)]
        return "\n".join(lines + [f"~ {new}\n~   was {old}" for old, new in self.changed])


@dataclass(frozen=True)
class GraphDiff:
    """The difference of two graphs; `print(diff)` shows it."""

    hunks: tuple[Hunk, ...]
    before: int  # number of nodes
    after: int

    @property
    def changed(self) -> bool:
        """Whether the graphs differ; the order of independent nodes and their names do not count."""
        return bool(self.hunks)

    def to_json(self, indent: int | None = None) -> str:
        """The hunks and node counts as JSON."""
        return json.dumps({"changed": self.changed, **asdict(self)}, indent=indent)

    def summary(self) -> str:
        """One line: how many rewrites and nodes."""
        if not self.hunks:
            return f"no difference: {_number(self.before, 'node')}"
        rewrites = sum(len(h.places) for h in self.hunks if h.rule)
        rules = len({h.rule for h in self.hunks if h.rule})
        total = {
            word: sum(len(h.places) * len(getattr(h, word)) for h in self.hunks)
            for word in ("removed", "added", "changed")
        }
        edits = ", ".join(f"{n} {word}" for word, n in total.items())
        text = f"{self.before} -> {self.after} nodes: {edits}"
        if not rewrites:
            return text
        return f"{text}; {_number(rewrites, 'rewrite')} by {_number(rules, 'rule')}"

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.hunks), self.summary()])

    def __rich__(self) -> Text:
        from rich.text import Text

        text = Text()
        for line in str(self).splitlines():
            text.append(line + "\n", style=COLOURS.get(line[:1], "") if line[1:2] in (" ", "@") else "")
        return text


def diff(a: fx.GraphModule | HasGraph, b: fx.GraphModule | HasGraph) -> GraphDiff:
    """The difference from `a` to `b`.

    Nodes are aligned first by origin (what a rewrite made stands for the nodes that it replaced), then by the
    longest common sequence of equal calls at equal places, then by name. What a rewrite left dead belongs to
    it. Changes that are equal but for integers in module paths and weight names are shown once, with their
    number.

    Raises TypeError where an argument holds no graph.
    """
    before, after = list(_graph(a).nodes), list(_graph(b).nodes)
    aligned = align(before, after)
    hunks = _folded(sorted([*_rewrites(aligned), *_edits(aligned)], key=lambda h: h.at))
    return GraphDiff(tuple(hunks), len(before), len(after))


def _graph(holder: fx.GraphModule | HasGraph) -> fx.Graph:
    gm = getattr(holder, "gm", holder)
    graph = getattr(gm, "graph", None)
    if not isinstance(graph, fx.Graph):
        kind = type(holder).__name__
        raise TypeError(f"{kind} holds no graph; give an fx.GraphModule or what graphopt.capture returns")
    return graph


# ------------------------------------------------------------------------------------------------- hunks


@dataclass
class _Place:
    """One change at one place, before equal ones are folded; `at` orders them by the program's order."""

    at: float
    path: str
    rule: str
    match: str
    removed: Sequence[fx.Node]
    added: Sequence[fx.Node]
    changed: Sequence[tuple[fx.Node, fx.Node]]


def _rewrites(aligned: Alignment) -> Iterator[_Place]:
    number_of = {n: i for i, n in enumerate(aligned.after)}
    for r in aligned.rewrites:
        path = next((p for p in map(module_path, (*r.added, *r.removed)) if p), "")
        yield _Place(number_of[r.added[0]], path, r.rule, r.match, r.removed, r.added, ())


def _edits(aligned: Alignment) -> list[_Place]:
    """Removed, added and changed nodes outside of rewrites; neighbours of one module share a hunk."""
    number_of = {n: i for i, n in enumerate(aligned.after)}
    new_of = {o: n for n, o in aligned.old_of.items()}
    items: list[_Place] = []
    gone = set(aligned.removed)
    last = -1
    for node in aligned.before:  # a removed node stands where the last node before it that stayed stands now
        if node in new_of:
            last = number_of[new_of[node]]
        elif node in gone:
            items.append(_Place(last + 0.5, module_path(node), "", "", [node], [], []))
    items += [_Place(number_of[n], module_path(n), "", "", [], [n], []) for n in aligned.added]
    same = Sameness(aligned)
    items += [
        _Place(number_of[n], module_path(n), "", "", [], [], [(o, n)])
        for n, o in aligned.old_of.items()
        if not same.calls(o, n)
    ]
    hunks: list[_Place] = []
    for item in sorted(items, key=lambda i: i.at):
        if hunks and hunks[-1].path == item.path:
            near = hunks[-1]
            near.removed = [*near.removed, *item.removed]
            near.added = [*near.added, *item.added]
            near.changed = [*near.changed, *item.changed]
        else:
            hunks.append(item)
    return hunks


def _folded(places: Iterable[_Place]) -> list[Hunk]:
    """Equal changes once, at the first one's place."""
    alike: dict[object, list[_Place]] = {}
    for place in places:
        alike.setdefault(_shape_of(place), []).append(place)
    return [
        Hunk(
            group[0].rule,
            tuple(p.path for p in group),
            tuple(p.match for p in group if p.match),
            tuple(map(_text, group[0].removed)),
            tuple(map(_text, group[0].added)),
            tuple((_text(old), _text(new)) for old, new in group[0].changed),
        )
        for group in alike.values()
    ]


def _shape_of(place: _Place) -> object:
    """Calls, types and inner wiring: equal for changes that differ only in integers of paths and weights."""
    inner = [*place.removed, *place.added, *(n for pair in place.changed for n in pair)]
    number_of = {n: i for i, n in enumerate(inner)}

    def about(node: fx.Node) -> object:
        names = weight_names(node)
        wires = tuple(
            number_of[n] if n in number_of else template(by_name(n)) if weight_names(n) else describe(val(n))
            for n in reads(node)
        )
        return skeleton(node), describe(val(node)), template(names[0]) if names else "", wires

    kinds = (len(place.removed), len(place.added), len(place.changed))
    return place.rule, template(place.path), kinds, tuple(map(about, inner))


def _text(node: fx.Node) -> str:
    left = f"return {literal(node.args[0])}" if node.op == "output" else f"{by_name(node)} = {call(node)}"
    about = "  ".join(t for t in (describe(val(node)), source(node).split(" ", 1)[0].rpartition("/")[2]) if t)
    return f"{left:<{COMMENT_COLUMN}}  # {about}" if about else left


def _number(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"
