"""What a compilation did: what was recognised, what was refused and why, which kernels run, what it cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from torch import fx

from graphopt.errors import RevertError
from graphopt.flops import unmatched
from graphopt.graph import SIZE_OPS, is_call, op_name, schema_arguments, tensor
from graphopt.observe import Event, KernelChosen, Matched, PassEnded, PassStarted, Refused, Warned
from graphopt.question import ALL, Answer, Question, answer
from graphopt.rewrite import KEPT_MISSES, Match, Refusal
from graphopt.verification import Verification

if TYPE_CHECKING:
    from rich.console import RenderableType

RECOGNISED = "recognise"  # the pass whose graph is counted
MERGED = "merge"  # where no pass has that name: the graph that this pass is given
COLOURS = {
    "recognised": "green",
    "warning": "yellow",
    "taken back": "yellow",
    "not optimised": "bold red",
    "near miss": "magenta",
    "graph break": "magenta",
}
NEAR = (
    3  # a miss with fewer matched parts, at a node that another rule made, is not worth a line of the summary
)
QUANTIZED = "quantize"  # the pass whose graph holds packed weights
SHARDED = "shard"  # the pass that puts collectives into a graph
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
INT8 = "int8_linear"  # its rule
KEPT = f"of misses, the report keeps the nearest {KEPT_MISSES} of each pass; graphopt.explain keeps none back"
SHOWN_KEPT = 3  # of the linears that were not quantized, in the summary
SHOWN_MISSES = 5  # the summary's; the report keeps the nearest miss of every rule


@dataclass(frozen=True)
class PassRun:
    """One run of one pass: time of the pass alone in seconds, number of nodes before and after."""

    name: str
    changed: bool
    seconds: float
    before: int
    after: int


class Rebuilds(Protocol):
    """A compiled program that can be built again."""

    def revert(self, identity: str) -> None: ...


@dataclass(frozen=True)
class Link:
    """How a report reaches the program that it is of: to look at it again, or to have it built again."""

    ask: Callable[[Question], Answer] | None = None
    find: Callable[[], Rebuilds | None] | None = None


NO_LINK = Link()


@dataclass
class Report:
    """The account of one compilation. `print(report)` shows it; `to_json()` keeps all of it."""

    counts: dict[str, int] = field(default_factory=dict)
    """Op name -> occurrences in the recognised graph: {"rms_norm": 5, "attention": 2, "aten.mul": 3}."""
    matches: tuple[Match, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    """What rules and passes declined, one for each rule and place: the one that came furthest."""
    near_misses: dict[str, Refusal] = field(default_factory=dict)
    """Rule -> its nearest miss: the refusal that came furthest into the pattern."""
    unmatched: dict[str, float] = field(default_factory=dict)
    """Op name -> share (0..1) of the recognised graph's FLOPs in heavy ATen calls; see `flops.unmatched`."""
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)
    """Op name -> kernel name -> number of calls."""
    passes: tuple[PassRun, ...] = ()
    warnings: tuple[str, ...] = ()
    fallback: str | None = None
    """Why the original program runs and not ours: one sentence; None where ours runs."""
    ends: str | None = None
    """Why Dynamo ended the graph before the program does: what follows runs in eager, or is another graph."""
    weights_prepared: int = 0
    weights_prepared_bytes: int = 0
    sharded_bytes: tuple[int, int] = (0, 0)
    """The bytes of all weights, and of what this rank reads of them; zeros where nobody asked for it."""
    quantized: int | None = None
    """How many weights are kept in fewer bits; None where nobody asked for it."""
    quantized_bytes: tuple[int, int] = (0, 0)
    """The bytes of those weights before, and now with their scales."""
    verification: Verification | None = None
    """What running the rewrites has shown; None where nobody asked for it (`verify`)."""
    link: Link = field(default=NO_LINK, repr=False, compare=False)
    """To the living program; JSON and pickles do not keep it."""

    def revert(self, match: Match | str) -> None:
        """Take a match back: the program is built again without it, and runs so from its next call on.

        Its id is denied, and the whole pipeline replayed: other rules may match in its place, what the match
        stood in the way of. This report is from then on that of the new program. Under `shard`, every rank
        has to revert the same.

        Args:
            match: one of `matches`, or its id.

        Raises:
            RevertError: the report is of no living program, no such match was applied, or the program without
                it cannot be built; it then stays as it is.
        """
        program = self.link.find() if self.link.find is not None else None
        if program is None:
            raise RevertError(
                "this report is of no program that still runs; take it from graphopt.backend.reports() while "
                "the compiled model lives"
            )
        program.revert(match if isinstance(match, str) else match.id)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "link"}

    @property
    def unmatched_share(self) -> float:
        """The share, in 0..1, of the FLOPs that is heavy work which no rule recognised."""
        return sum(self.unmatched.values())

    def to_json(self, indent: int | None = None) -> str:
        """The whole report as JSON; `from_json` reads it back."""
        fields = asdict(replace(self, link=NO_LINK))
        del fields["link"]
        return json.dumps(fields, indent=indent)

    def explain(self, rule: str = ALL, module: str = ALL, node: str = ALL) -> Answer:
        """What matched, what nearly matched and why not, of rules, modules and nodes (`fnmatch` patterns).

        The report of `graphopt.explain` looks at the program again, so that no miss is too far off to be
        told. Any other answers from the nearest misses, which it keeps.

        Raises:
            OptionError: the program has no such rule, module or node (only where it is looked at again).
        """
        question = Question(rule, module, node)
        if self.link.ask is not None:
            return self.link.ask(question)
        known = answer(question, self.matches, self.refusals)
        return replace(known, notes=(*known.notes, KEPT))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises ValueError for any other text."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or not fields.keys() <= cls.__dataclass_fields__.keys():
            raise ValueError("not a graphopt report; give the text that Report.to_json() returned")
        fields["matches"] = tuple(_match(m) for m in fields.get("matches", ()))
        fields["refusals"] = tuple(Refusal(**r) for r in fields.get("refusals", ()))
        fields["near_misses"] = {rule: Refusal(**r) for rule, r in fields.get("near_misses", {}).items()}
        fields["passes"] = tuple(PassRun(**p) for p in fields.get("passes", ()))
        fields["warnings"] = tuple(fields.get("warnings", ()))
        fields["sharded_bytes"] = tuple(fields.get("sharded_bytes", (0, 0)))
        fields["quantized_bytes"] = tuple(fields.get("quantized_bytes", (0, 0)))
        if fields.get("verification") is not None:
            fields["verification"] = Verification.read(fields["verification"])
        return cls(**fields)

    def summary(self) -> str:
        """The report in a few lines of plain text; `str(report)` is the same."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)

    def __str__(self) -> str:
        return self.summary()

    def __rich__(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=None, show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in self._rows():
            table.add_row(name, Text(text, style=COLOURS.get(name, "")))
        return table

    def _rows(self) -> list[tuple[str, str]]:
        """The summary's lines as (name, text)."""
        ours = {name: n for name, n in self.counts.items() if "." not in name}
        theirs = {name: n for name, n in self.counts.items() if "." in name}
        rows = [("graphopt", self._headline())]
        if self.fallback is not None:
            rows.append(("not optimised", self.fallback))
        if self.counts:
            rows.append(("recognised", _tally(ours) or "nothing"))
            rows.append(("left as ATen", _tally(theirs, most=8) or "nothing"))
            shares = "".join(f", {name} {share:.1%}" for name, share in self.unmatched.items())
            rows.append(("unmatched", f"{self.unmatched_share:.1%} of FLOPs{shares.replace(',', ':', 1)}"))
        rows += [("near miss", _miss(r)) for r in self._worth_showing()]
        rows += [("graph break", self.ends)] if self.ends else []
        rows += [("kernels", f"{op}: {_tally(names)}") for op, names in self.kernels.items()]
        if self.weights_prepared:
            size = f"{self.weights_prepared_bytes / 2**20:.1f} MiB"
            rows.append(("weights", f"{self.weights_prepared} prepared, {size}"))
        if any(self.sharded_bytes):
            whole, mine = (f"{size / 2**20:.1f}" for size in self.sharded_bytes)
            rows.append(("sharded", f"{whole} -> {mine} MiB of weights on this rank"))
        if self.quantized is not None:
            rows.append(("quantized", self._quantized()))
        if self.verification is not None:
            rows.append(("verified", str(self.verification)))
            rows += [("taken back", str(taken)) for taken in self.verification.taken_back]
            rows += [("not verified", str(left)) for left in self.verification.not_verified[:SHOWN_KEPT]]
            more = len(self.verification.not_verified) - SHOWN_KEPT
            rows += [("not verified", f"{more} more")] if more > 0 else []
            whole_graph = self.verification.whole
            rows += [("whole graph", str(whole_graph))] if whole_graph is not None else []
        rows += [("warning", text) for text in self.warnings]
        return rows

    @property
    def kept(self) -> tuple[Refusal, ...]:
        """The linears that were not quantized, with the reasons."""
        return tuple(r for r in self.refusals if r.rule == INT8)

    def _quantized(self) -> str:
        before, after = (f"{size / 2**20:.1f}" for size in self.quantized_bytes)
        text = f"{_number(self.quantized or 0, 'weight', 'weights')}, {before} -> {after} MiB"
        if not self.kept:
            return text
        shown = [f"{r.module_path or r.node} ({r.reason})" for r in self.kept[:SHOWN_KEPT]]
        more = len(self.kept) - len(shown)
        return f"{text}; kept {', '.join(shown)}" + (f", and {more} more" if more else "")

    def _headline(self) -> str:
        rules = len({m.rule for m in self.matches})
        text = f"{_number(len(self.matches), 'match', 'matches')} by {_number(rules, 'rule', 'rules')}"
        if not self.passes:
            return text
        nodes = f"{self.passes[0].before} -> {self.passes[-1].after} nodes"
        milliseconds = 1000 * sum(p.seconds for p in self.passes)
        return f"{text}, {nodes} in {_number(len(self.passes), 'pass', 'passes')}, {milliseconds:.0f} ms"

    def _worth_showing(self) -> list[Refusal]:
        """Near misses, furthest first; not of rules that matched, nor at nodes that another rule took."""
        matched = {m.rule for m in self.matches}
        taken = {name for m in self.matches for name in m.nodes}
        made = {name for m in self.matches for name in m.new_nodes}
        left = [
            r for r in self.near_misses.values() if r.rule not in {*matched, INT8} and r.node not in taken
        ]
        left = [r for r in left if r.depth >= NEAR or r.node not in made]
        return sorted(left, key=lambda r: -r.depth)[:SHOWN_MISSES]


class ReportObserver:
    """Builds the report of one compilation from its events; `report` is it, at any time."""

    def __init__(self) -> None:
        self._report = Report()
        self._matches: dict[str, Match] = {}
        self._refusals: dict[tuple[str, str, str], Refusal] = {}
        self._kernels: dict[str, Counter[str]] = {}
        self._before = 0
        self._counted = False
        self._last: fx.GraphModule | None = None

    def on_event(self, event: Event) -> None:
        """Take one event into account."""
        for kind, take in _TAKERS.items():
            if isinstance(event, kind):
                take(self, event)

    @property
    def report(self) -> Report:
        """The report of what has happened so far."""
        report = self._report
        if not self._counted and self._last is not None:
            self._count(self._last)
        report.matches = tuple(self._matches.values())
        report.refusals = tuple(self._refusals.values())
        report.near_misses = nearest(report.refusals)
        report.kernels = {op: dict(names.most_common()) for op, names in self._kernels.items()}
        return report

    def _started(self, event: PassStarted) -> None:
        self._before = len(event.gm.graph.nodes)
        if event.name == MERGED and not self._counted:
            self._count(event.gm)
            self._counted = True

    def _ended(self, event: PassEnded) -> None:
        run = PassRun(event.name, event.changed, event.seconds, self._before, len(event.gm.graph.nodes))
        self._report.passes += (run,)
        if event.name == QUANTIZED:
            self._report.quantized, *sizes = packed(event.gm.graph)
            self._report.quantized_bytes = (sizes[0], sizes[1])
        if event.name == SHARDED:
            found = counts(event.gm.graph)
            self._report.counts |= {name: found[name] for name in COLLECTIVES if name in found}
            self._report.sharded_bytes = event.gm.meta.get("sharded_bytes", (0, 0))
        if self._counted:
            return
        if event.name == RECOGNISED:
            self._count(event.gm)
            self._counted, self._last = True, None
        else:
            self._last = event.gm

    def _count(self, gm: fx.GraphModule) -> None:
        self._report.counts = counts(gm.graph)
        self._report.unmatched = unmatched(gm.graph)

    def _matched(self, event: Matched) -> None:
        self._matches[event.match.id] = event.match

    def _refused(self, event: Refused) -> None:
        refusal = event.refusal
        place = (refusal.rule, refusal.module_path, refusal.node)
        known = self._refusals.get(place)
        if known is None or refusal.depth > known.depth:
            self._refusals[place] = refusal

    def _chosen(self, event: KernelChosen) -> None:
        self._kernels.setdefault(event.op, Counter())[event.kernel] += 1

    def _warned(self, event: Warned) -> None:
        if event.message not in self._report.warnings:
            self._report.warnings += (event.message,)


_TAKERS: Mapping[type, Callable[..., None]] = {
    PassStarted: ReportObserver._started,
    PassEnded: ReportObserver._ended,
    Matched: ReportObserver._matched,
    Refused: ReportObserver._refused,
    KernelChosen: ReportObserver._chosen,
    Warned: ReportObserver._warned,
}


def counts(graph: fx.Graph) -> dict[str, int]:
    """Op name -> occurrences, ours first, each by falling number; without arithmetic on sizes and getitem."""
    operators = (n for n in graph.nodes if is_call(n) and n.target not in SIZE_OPS)
    found = Counter(op_name(n) for n in operators if schema_arguments(n.target))
    return dict(sorted(found.items(), key=lambda item: ("." in item[0], -item[1], item[0])))


def packed(graph: fx.Graph) -> tuple[int, int, int]:
    """How many weights are packed into fewer bits, their bytes before, and then with their scales."""
    calls = [n for n in graph.nodes if op_name(n).startswith("pack_")]
    scales = dict.fromkeys(n for call in calls for n in call.all_input_nodes if n != call.args[0])
    before = sum(_bytes(call.args[0]) for call in calls)
    return len(calls), before, sum(_bytes(n) for n in (*calls, *scales))


def _bytes(node: object) -> int:
    value = tensor(node) if isinstance(node, fx.Node) else None
    return 0 if value is None else value.numel() * value.element_size()


def nearest(refusals: Iterable[Refusal]) -> dict[str, Refusal]:
    """Rule -> the refusal that came furthest into its pattern; the earliest of equals."""
    found: dict[str, Refusal] = {}
    for refusal in refusals:
        if refusal.rule not in found or refusal.depth > found[refusal.rule].depth:
            found[refusal.rule] = refusal
    return found


def _match(fields: dict[str, object]) -> Match:
    """A match from JSON, where its tuples are lists."""
    read = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Match(**read)  # type: ignore[arg-type]  # what asdict wrote


def _miss(refusal: Refusal) -> str:
    source = refusal.source.split(" ", 1)[0]
    place = (refusal.module_path or refusal.node) + (f" ({source})" if source else "")
    return f"{refusal.rule} at {place}: {refusal.reason}"


def _tally(numbers: Mapping[str, int], most: int | None = None) -> str:
    shown = list(numbers.items())[:most]
    more = len(numbers) - len(shown)
    return ", ".join(f"{name} {n}" for name, n in shown) + (f", and {more} more" if more else "")


def _number(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
