"""One type of the zoo: built, counted in eager, compiled and judged in each dtype, padded and not."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt import backend
from graphopt.accuracy import judge, raise_to_fp64
from graphopt.capture import from_dynamo
from graphopt.errors import CaptureRefused, GraphoptError
from graphopt.report import Report, nearest
from graphopt.rewrite import Refusal
from graphopt.tools.zoo.build import kinds, tiny_model
from graphopt.tools.zoo.census import OPS_OF, expected_counts, recognised_counts
from graphopt.tools.zoo.choices import clear_seed
from graphopt.tools.zoo.inputs import FIRST_TOKEN, example
from graphopt.tools.zoo.row import TOKENS, Row, Run
from graphopt.tools.zoo.weights import in_dtype

PADDINGS = ("none", "left")
MISSES = 16  # kept of a run, the nearest
LONG = 300  # characters of an error that are kept
WRITERS = frozenset({"causal LM", "encoder-decoder", "speech"})  # groups of types that may `generate`


def examine(
    model_type: str,
    dtypes: Sequence[torch.dtype],
    paddings: Sequence[str] = PADDINGS,
    *,
    decoding: bool = True,
    thorough: bool = False,
) -> Row:
    """The row of a type; raises nothing: what fails is in it.

    Args:
        decoding: in fp32, decode some tokens too, where the type writes text.
        thorough: keep where each rule matched, and each rule's nearest miss of where it did not.
    """
    row = Row(model_type, kinds()[model_type].group)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the backend: the report has them
        try:
            model = tiny_model(model_type)
            counts = expected_counts(model, **example(model))
            row.there = {name: n for name, n in counts.items() if n}
            seeds = {padding: clear_seed(model, padding) for padding in paddings}
            for dtype in dtypes:
                if dtype != torch.float32:
                    in_dtype(model, dtype)
                _runs(row, model, dtype, seeds, thorough)
                if decoding and dtype == torch.float32 and _writes(row, model):
                    _decode(row, model, seeds.get("left", 0), thorough)
        except Exception as error:
            row.broken = _told(error)
    row.seconds = round(time.process_time() - started, 2)
    return row


def _runs(
    row: Row, model: torch.nn.Module, dtype: torch.dtype, seeds: Mapping[str, int], thorough: bool
) -> None:
    """Add a run for each padding that the model takes, on its seed of inputs."""
    for padding, seed in seeds.items():
        given = example(model, padding=padding, dtype=dtype, seed=seed)
        mask = given.get("attention_mask")
        if padding != "none" and mask is None:
            continue
        with torch.no_grad():
            model(**given)  # what fails in eager is no matter of ours
        name = f"{str(dtype).removeprefix('torch.')} {padding}"
        row.runs[name] = _run(model, given, mask, dtype, thorough)


def _run(
    model: torch.nn.Module,
    given: Mapping[str, torch.Tensor],
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    thorough: bool = False,
) -> Run:
    torch.compiler.reset()
    beside = Beside(dtype, mask, thorough)
    compiled = torch.compile(model, backend=beside, dynamic=False)
    try:
        with torch.no_grad():
            compiled(**given)
            beside.run.graphs, beside.counting = len(beside.reports), False
            compiled(**given)
    except Exception as error:
        beside.run.wrong.append(_told(error))
        beside.run.graphs = beside.run.graphs or len(beside.reports)
    return beside.finished()


def _writes(row: Row, model: torch.nn.Module) -> bool:
    """Whether a type gives tokens by `generate`."""
    can = getattr(model, "can_generate", None)
    return row.group in WRITERS and can is not None and can()


def _decode(
    row: Row,
    model: Any,  # a class of transformers, which has no types
    seed: int = 0,
    thorough: bool = False,
) -> None:
    """Greedy tokens of a padded prompt by the model's own `generate`, in eager and compiled."""
    given = example(model, padding="left", seed=seed)
    given.pop("decoder_input_ids", None)
    arguments = dict(
        given, do_sample=False, num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS, use_cache=True
    )
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        arguments["decoder_start_token_id"] = FIRST_TOKEN
    try:
        expected = model.generate(**arguments)
    except Exception as error:
        row.undecoded = _told(error)
        return
    torch.compiler.reset()
    beside = Beside(torch.float32, given.get("attention_mask"), thorough)
    row.decoded = beside.run
    model.compile(backend=beside, dynamic=False)
    try:
        tokens = model.generate(**arguments)
    except Exception as error:
        beside.run.wrong.append(_told(error))
    else:
        beside.run.tokens = int((tokens[:, -TOKENS:] == expected[:, -TOKENS:]).sum())
        if not torch.equal(tokens, expected):
            beside.run.wrong.append(f"greedy tokens {tokens.tolist()}, eager's are {expected.tolist()}")
    finally:
        model._compiled_call_impl = None
    beside.run.graphs = len(beside.reports)
    beside.finished()


@dataclass
class Beside:
    """A backend that is graphopt, and runs each graph beside the original and its fp64 oracle."""

    dtype: torch.dtype
    mask: torch.Tensor | None
    thorough: bool = False
    run: Run = field(default_factory=Run)
    counting: bool = True
    reports: list[Report | None] = field(default_factory=list)
    judged: set[int] = field(default_factory=set)

    def __call__(self, gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        """As `torch.compile` calls a backend."""
        number = len(self.reports)
        ours, report = self._ours(gm, examples)
        self.reports.append(report)
        if report is None:
            return ours
        oracle = self._oracle(gm, examples)

        def call(*values: object) -> object:
            if self.counting:
                self._count(report)
            with torch.no_grad():
                expected = oracle(*_copies(values)) if oracle else None
                eager = gm.forward(*_copies(values))
                result = ours(*values)
                if oracle:
                    self._judge(number, expected, eager, result)
            return result

        return call

    def _ours(
        self, gm: fx.GraphModule, examples: Sequence[object]
    ) -> tuple[Callable[..., object], Report | None]:
        """What graphopt makes of it, strictly; the original where it refuses, with the reason noted."""
        try:
            run = backend.graphopt(gm, examples, options={"strict": True})
        except Exception as error:
            self.run.refused.append(_told(error))
            self.run.handed_back += 1
            return gm.forward, None
        return run, backend.reports()[-1]

    def _oracle(self, gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object] | None:
        try:
            return raise_to_fp64(from_dynamo(gm, examples).gm)
        except (CaptureRefused, ValueError) as error:
            self.run.refused.append(f"no oracle: {_told(error)}")
            return None

    def _count(self, report: Report) -> None:
        run = self.run
        for name, n in recognised_counts(report.counts).items():
            run.found[name] = run.found.get(name, 0) + n
        for name, share in report.unmatched.items():
            run.unmatched[name] = max(share, run.unmatched.get(name, 0.0))

    def _judge(self, number: int, expected: object, eager: object, result: object) -> None:
        try:
            verdict = judge(self._real(expected), self._real(eager), self._real(result), self.dtype)
        except (TypeError, ValueError) as error:
            self.run.refused.append(f"cannot be judged: {_told(error)}")
            return
        self.judged.add(number)
        if not verdict.ok and verdict.reason not in self.run.wrong:
            self.run.wrong.append(verdict.reason or "")

    def _real(self, outputs: object) -> tuple[object, ...]:
        """A graph's outputs at real tokens: what stands at padding means nothing."""
        values = tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)
        if self.mask is None:
            return values
        rows, shape = self.mask.bool(), self.mask.shape
        return tuple(x[rows] if isinstance(x, torch.Tensor) and x.shape[:2] == shape else x for x in values)

    def finished(self) -> Run:
        """The run, with matches and near misses of all reports."""
        run = self.run
        run.recompiled, run.judged = len(self.reports) - run.graphs, len(self.judged)
        run.found = {name: run.found.get(name, 0) for name in OPS_OF if run.found.get(name)}
        run.unmatched = {name: round(share, 4) for name, share in run.unmatched.items() if share >= 5e-5}
        run.refused = list(dict.fromkeys(run.refused))
        reports = [report for report in self.reports if report is not None]
        run.matched = dict(sorted(Counter(m.rule for r in reports for m in r.matches).items()))
        run.ends = list(dict.fromkeys(r.ends for r in reports if r.ends is not None))
        if self.thorough:
            run.places = _places(reports)
        misses = _all_nearest(reports) if self.thorough else _nearest(reports, run.matched)
        run.misses = {r.rule: _miss(r) for r in misses}
        return run


def _places(reports: Sequence[Report]) -> dict[str, str]:
    """Where each rule matched first, in the order of matching: what a rule matches may be another's work."""
    places: dict[str, str] = {}
    for match in (match for report in reports for match in report.matches):
        places.setdefault(match.rule, f"{match.module_path or match.nodes[0]} ({_line(match.source)})")
    return places


def _all_nearest(reports: Sequence[Report]) -> list[Refusal]:
    """Each rule's near miss that came furthest, of the places where it did not match in the end."""
    missed = [r for report in reports for r in report.explain().misses]
    return sorted(nearest(missed).values(), key=lambda r: -r.depth)


def _nearest(reports: Sequence[Report], matched: Mapping[str, int]) -> list[Refusal]:
    """The near misses that came furthest, of the rules that matched nowhere."""
    furthest: dict[str, Refusal] = {}
    for report in reports:
        for rule, refusal in report.near_misses.items():
            if rule not in matched and (rule not in furthest or refusal.depth > furthest[rule].depth):
                furthest[rule] = refusal
    return sorted(furthest.values(), key=lambda r: -r.depth)[:MISSES]


def _miss(refusal: Refusal) -> str:
    place = f"{refusal.node} in {refusal.module_path}" if refusal.module_path else refusal.node
    return f"at {place} ({_line(refusal.source)}): {refusal.reason}"


def _line(source: str) -> str:
    """File and line, without the code."""
    return source.split(" ", 1)[0]


def _copies(values: Sequence[object]) -> list[object]:
    """Values whose change is seen by nobody; weights as they are, which no graph of the zoo changes."""
    copied: dict[int, object] = {}
    for x in values:
        if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter):
            copied.setdefault(id(x), x.clone())
    return [copied.get(id(x), x) for x in values]


def _told(error: Exception) -> str:
    """An error in one line."""
    kind = "" if isinstance(error, GraphoptError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:LONG]
