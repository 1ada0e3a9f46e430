"""A question about a compilation (what did this rule do there, and why not?), and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.rewrite import Match, Refusal

ALL = "*"
SHOWN = 12  # misses in the text of an answer, the nearest first; its JSON has all of them


@dataclass(frozen=True)
class Question:
    """Patterns (`fnmatch`) of what is asked about; `*` is everything.

    Attributes:
        rule: a rule's name, as `llama_rms_norm` or `*_attention`.
        module: a module's path or its end, as `model.layers.1.*` or `mlp`; what lies below is meant too.
        node: a node's name in the captured graph or in a later one, as `mul_14`.
    """

    rule: str = ALL
    module: str = ALL
    node: str = ALL

    def about(self, rule: str, modules: Iterable[str], nodes: Iterable[str]) -> bool:
        """Whether something of this rule, in these modules and at these nodes is asked about."""
        if not fnmatchcase(rule, self.rule):
            return False
        if self.node != ALL and not any(fnmatchcase(name, self.node) for name in nodes):
            return False
        return self.module == ALL or any(within(path, self.module) for path in modules)

    def about_match(self, match: Match) -> bool:
        """Whether a match is part of the answer."""
        return self.about(match.rule, (match.module_path,), (*match.nodes, *match.new_nodes))

    def about_refusal(self, refusal: Refusal) -> bool:
        """Whether a miss is: by the place where the rule was tried, or by the node that differs."""
        modules = (refusal.anchor_path, refusal.module_path)
        return self.about(refusal.rule, modules, (refusal.anchor, refusal.node))

    def __str__(self) -> str:
        asked = [(n, v) for n, v in asdict(self).items() if v != ALL]
        return ", ".join(f"{name} {value}" for name, value in asked) or "every rule, everywhere"


def within(path: str, pattern: str) -> bool:
    """Whether a module path is one that a pattern means: its whole, its end, or what lies below either."""
    return any(
        fnmatchcase(path, f"{before}{pattern}{below}") for before in ("", "*.") for below in ("", ".*")
    )


@dataclass(frozen=True)
class Answer:
    """What matched, what nearly matched (the nearest first) and what else is to say, as `notes`."""

    question: Question
    matches: tuple[Match, ...] = ()
    misses: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        lines = [f"{self.question}: {len(self.matches)} matched, {len(self.misses)} missed"]
        lines += [line for match in self.matches for line in _match_lines(match)]
        lines += [line for miss in self.misses[:SHOWN] for line in _miss_lines(miss)]
        if len(self.misses) > SHOWN:
            lines.append(f"  and {len(self.misses) - SHOWN} misses that came less far; the JSON has them")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def answer(question: Question, matches: Iterable[Match], refusals: Iterable[Refusal]) -> Answer:
    """The part of a compilation's account that a question is about.

    A miss is left out where the same rule matched at the same place in the end. Of the misses at one place
    that say the same, one is kept.
    """
    applied = tuple(matches)
    found = tuple(m for m in applied if question.about_match(m))
    taken = {(m.rule, name) for m in applied for name in m.nodes}
    misses = [
        r for r in refusals if r.depth and question.about_refusal(r) and (r.rule, r.anchor) not in taken
    ]
    nearest = sorted(dict.fromkeys(misses), key=lambda r: -r.depth)
    return Answer(question, found, tuple(nearest), tuple(_takers(question, applied, found, nearest)))


def _takers(
    question: Question, applied: Sequence[Match], found: Sequence[Match], misses: Sequence[Refusal]
) -> list[str]:
    """Where a rule found nothing because others had taken the nodes that are asked about."""
    if found or misses or question.rule == ALL or (question.module, question.node) == (ALL, ALL):
        return []
    anything = Question(ALL, question.module, question.node)
    others = [m for m in applied if anything.about_match(m)]
    return [f"{m.rule} took {', '.join(m.nodes)} there [{m.id}]" for m in others[:SHOWN]]


def _match_lines(match: Match) -> list[str]:
    return [
        f"  matched {match.rule} in {match.module_path or 'the graph'}  [{match.id}]",
        f"    {', '.join(match.nodes)} -> {', '.join(match.new_nodes)}",
        *([f"    {match.source}"] if match.source else []),
    ]


def _miss_lines(miss: Refusal) -> list[str]:
    nodes = f"{miss.depth} {'node' if miss.depth == 1 else 'nodes'} matched"
    at = f", from {miss.anchor} up" if miss.anchor and miss.anchor != miss.node else ""
    rows = [(name, getattr(miss, name)) for name in ("source", "expected", "found", "guard")]
    return [
        f"  missed {miss.rule} in {miss.anchor_path or miss.module_path or 'the graph'}: {nodes}{at}",
        f"    {'node':<9} {miss.node}: {miss.reason}",
        *(f"    {name:<9} {text}" for name, text in rows if text),
    ]
