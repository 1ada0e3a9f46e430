"""Answer a question about a program: run its passes again and keep every miss that the question is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import fx

import graphopt.defaults as defaults
from graphopt import graph as g
from graphopt.binding import target_name
from graphopt.capture import Captured
from graphopt.errors import OptionError
from graphopt.observe import Event, Matched, Refused
from graphopt.options import Options
from graphopt.passes import leftovers, masks, merge, quantize, shard
from graphopt.passes.canonicalize import canonicalize
from graphopt.patterns.fused import FUSIONS
from graphopt.pipeline import Pipeline
from graphopt.question import ALL, Answer, Question, answer
from graphopt.rewrite import UNTRIED, Match, Refusal
from graphopt.rule import Rule, variants
from graphopt.translate import Translation

RULES_OF_PASSES = tuple(p.RULE for p in (masks, leftovers, merge, shard, quantize))
LOWERED = "lowered"  # what a pass provides that needs no rule


def ask(program: Captured, question: Question, options: Options | None = None) -> Answer:
    """What matched, what nearly matched and why not, of what is asked about, in all passes of these options.

    Raises:
        OptionError: there is no such rule, module or node; the error names the nearest one.
    """
    _check(question.rule, rule_names(), "rule")
    modules = {g.module_path(n) for n in program.gm.graph.nodes} - {""}
    _check_module(question.module, modules)
    heard = _Heard()
    context = defaults.context(options, observers=(heard,))
    context.question = question
    road = defaults.pipeline(options)
    road = Pipeline(tuple(p for p in road.passes if LOWERED not in p.provides))
    done, _ = road.run(program, context)
    _check(question.node, heard.names(program.gm.graph, done.gm.graph), "node")
    found = answer(question, heard.matches, heard.refusals)
    return replace(found, notes=(*found.notes, *_untried(question, found, heard, program.gm.graph)))


def rule_names() -> tuple[str, ...]:
    """What a rule may be called: the tables' rules, those of fusion, and the passes' own."""
    tables = (*defaults.RULES, *(rule for stage in FUSIONS for rule in stage))
    return tuple(dict.fromkeys((*(rule.name for rule in tables), *RULES_OF_PASSES)))


@dataclass
class _Heard:
    """Every match and refusal of a run."""

    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        """Keep it."""
        if isinstance(event, Matched):
            self.matches.append(event.match)
        if isinstance(event, Refused):
            self.refusals.append(event.refusal)

    def names(self, *graphs: fx.Graph) -> set[str]:
        """The nodes that the program had on its way."""
        names = {node.name for graph in graphs for node in graph.nodes}
        names.update(name for m in self.matches for name in (*m.nodes, *m.new_nodes))
        return names.union(name for r in self.refusals for name in (r.node, r.anchor) if name)


def _untried(question: Question, found: Answer, heard: _Heard, graph: fx.Graph) -> Iterator[str]:
    """Why rules that are asked for by name were tried nowhere, or not there."""
    if question.rule == ALL:
        return
    for refusal in dict.fromkeys(r for r in heard.refusals if r.guard == UNTRIED):
        if fnmatchcase(refusal.rule, question.rule):
            yield f"{refusal.rule} was tried nowhere: {refusal.reason}"
    untried = {r.rule for r in heard.refusals if r.guard == UNTRIED}
    if found.matches or found.misses:
        return
    for rule in defaults.RULES:
        if fnmatchcase(rule.name, question.rule) and rule.name not in untried:
            yield f"{rule.name} was not tried there: it begins at {_anchors(rule, graph)}"


def _anchors(rule: Rule | Translation, graph: fx.Graph) -> str:
    """The operators from which a rule is tried."""
    if isinstance(rule, Translation):
        return target_name(rule.target)
    dtypes = {v.dtype for n in graph.nodes if isinstance(v := g.val(n), torch.Tensor)}
    anchors = {target_name(v.anchor.target) for v in variants(rule, dtypes, canonicalize)}
    return " or ".join(sorted(anchors)) or "nothing of these dtypes"


def _check(pattern: str, known: Iterable[str], what: str) -> None:
    """Raise OptionError where nothing has such a name."""
    names = tuple(known)
    if not any(fnmatchcase(name, pattern) for name in names):
        raise OptionError(f"no {what} {pattern!r}; {_near(pattern, names)}")


def _check_module(pattern: str, paths: set[str]) -> None:
    """Raise OptionError where no module has such a path."""
    if pattern != ALL and not any(Question(module=pattern).about(ALL, (path,), ()) for path in paths):
        raise OptionError(f"no module {pattern!r} has nodes in the graph; {_near(pattern, tuple(paths))}")


def _near(word: str, names: tuple[str, ...]) -> str:
    close = get_close_matches(word, names, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"one of {len(names)} is {min(names, default='')!r}"
