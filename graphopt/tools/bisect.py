"""Find the smallest set of rewrites that makes a model's results wrong, and show each as two functions."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import fx

from graphopt import defaults
from graphopt import graph as g
from graphopt.accuracy import judge, raise_to_fp64
from graphopt.aliasing import written_inputs
from graphopt.capture import Captured, capture, from_dynamo
from graphopt.errors import BisectError, CaptureRefused
from graphopt.options import Options
from graphopt.pipeline import Context, Pipeline
from graphopt.steering import Steering
from graphopt.tools.culprits import MOST, Found, Recorder, Rewrite, Trial, find
from graphopt.tools.functions import PREAMBLE, Functions, Shower

LONGEST = 60  # lines of a function that are printed; JSON has all


@dataclass(frozen=True)
class Culprit:
    """A rewrite that breaks the results: a match, a kernel (rule `op/kernel`), or a whole pass (no rule).

    `before` and `after` are the source of two Python functions with the same parameters; `code` is a file.
    """

    pass_name: str
    rule: str
    match: str
    module_path: str
    source: str
    before: str
    after: str

    @property
    def code(self) -> str:
        """The imports and both functions, as a file that runs."""
        return Functions(self.before, self.after).code

    def __str__(self) -> str:
        what = f"{self.rule} in {self.module_path or 'the graph'}" if self.match else self.rule or "the pass"
        lines = [f"# {what} (pass {self.pass_name})" + (f"  [{self.match}]" if self.match else "")]
        lines += [f"# {self.source}"] if self.source else []
        return "\n".join([*lines, "", _cut(self.before), "", _cut(self.after)])


@dataclass(frozen=True)
class Bisection:
    """The smallest set of rewrites that breaks; empty where nothing does. `print(bisection)` shows it.

    Attributes:
        culprits: the rewrites; several are wrong only together.
        needs: ids of matches without which they cannot be made.
        broken: what is wrong with these alone.
        candidates: how many rewrites the whole compilation has.
        runs: how often it was compiled and run.
    """

    culprits: tuple[Culprit, ...] = ()
    needs: tuple[str, ...] = ()
    broken: str = ""
    candidates: int = 0
    runs: int = 0

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        if not self.culprits:
            return "nothing is broken"
        together = (
            "this rewrite" if len(self.culprits) == 1 else f"these {len(self.culprits)} rewrites together"
        )
        lines = [f"broken by {together}, of {self.candidates}, after {self.runs} runs: {self.broken}"]
        lines += [f"needs {name}" for name in self.needs]
        return "\n".join([*lines, "", PREAMBLE, *(f"{c}\n" for c in self.culprits)])


def bisect(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    options: Mapping[str, object] | None = None,
    tolerance: float | None = None,
    most: int = MOST,
) -> Bisection:
    """The smallest set of rewrites with which a model's results are wrong; single process.

    Args:
        model, args, kwargs: a call of the model on real tensors, which stay as they are.
        options: as of `torch.compile(..., options=...)`.
        tolerance: the largest absolute difference from the unmodified program that is right; None judges by
            the accuracy rule (`graphopt.accuracy.judge`, against an fp64 run of the captured graph).
        most: how often the model may be compiled and run.

    Raises:
        BisectError: the results are wrong without any rewrite, differ between equal runs, or `most` was not
            enough.
        CaptureRefused: the program is out of scope as a whole.
        OptionError: an unknown option or value.
    """
    chosen = Options.parse(options)
    if chosen.shard > 1:
        raise BisectError(f"option shard is {chosen.shard}; bisect one process, with shard=1")
    program, values = flat_call(model, args, kwargs or {})
    inputs, changed = g.placeholders(program.gm.graph), written_inputs(program.gm.graph)
    written = tuple(i for i, node in enumerate(inputs) if node in changed)
    wrong = _wrong(program, values, written, tolerance)
    subject = _Subject(program, values, written, chosen, wrong)
    found = find(subject.run, most)
    if found is None:
        return Bisection()
    shower = Shower(frozenset(r.key for r in found.culprits))
    with contextlib.suppress(Exception):  # what raises was found to be broken so, and has no after
        subject.compiled(found.steering, shower)
    return bisection(found, shower.found)


def bisection(found: Found, functions: Mapping[str, Functions]) -> Bisection:
    """What is told of a search's answer."""
    culprits = tuple(culprit(r, functions.get(r.key, Functions("", ""))) for r in found.culprits)
    return Bisection(culprits, tuple(r.key for r in found.needs), found.broken, found.candidates, found.runs)


def culprit(rewrite: Rewrite, functions: Functions) -> Culprit:
    """A rewrite and its two functions."""
    about = {k: v for k, v in asdict(rewrite).items() if k != "needs"}
    return Culprit(**about, before=functions.before, after=functions.after)


def flat_call(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> tuple[Captured, list[object]]:
    """The captured program, and the values of its placeholders in this call: inputs and weights.

    What torch.export cannot take (a StaticCache, say) comes through Dynamo, which is stopped before it runs.
    """
    try:
        program = capture(model, *args, **kwargs)
        return program, program.bind(tuple(args), kwargs)
    except CaptureRefused as refused:
        if not isinstance(model, torch.nn.Module):
            raise
        found: list[tuple[Captured, list[object]]] = []

        def hand_over(gm: fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., object]:
            program = from_dynamo(gm, examples)

            def stop(*values: object) -> object:
                found.append((program, list(values)))
                raise _Stop

            return stop

        try:
            with torch.no_grad():
                torch.compile(model, backend=hand_over, fullgraph=True, dynamic=False)(*args, **kwargs)
        except Exception:  # Dynamo's own, or ours through Dynamo
            if not found:
                raise refused from None
        return found[0]


class _Stop(Exception):
    """Ends a call whose values have been seen."""


@dataclass(frozen=True)
class _Subject:
    """A program that is compiled and run again and again, on the same values."""

    program: Captured
    values: list[object]
    written: tuple[int, ...]  # positions of the inputs that the program writes
    options: Options
    wrong: Callable[[list[object]], str | None]

    def run(self, steering: Steering) -> Trial:
        """Compile, run, judge. What raises is broken."""
        recorder = Recorder()
        try:
            compiled = self.compiled(steering, recorder)
            broken = self.wrong(results(compiled, self.values, self.written))
        except Exception as error:
            text = str(error).strip().splitlines()
            broken = f"{type(error).__name__}: {text[0] if text else ''}"
        return Trial(broken, tuple(recorder.rewrites.values()), tuple(recorder.passes))

    def compiled(self, steering: Steering, *observers: Recorder | Shower) -> Captured:
        """The program after the steered pipeline."""
        device = next(
            (v.device for v in self.values if isinstance(v, torch.Tensor) and v.device.type != "cpu"), "cpu"
        )
        road: Pipeline = defaults.pipeline(self.options, device=device)
        context: Context = defaults.context(self.options, device=device, observers=observers)
        road, context = steering.steer(road, context)
        return road.run(self.program, context)[0]


# ------------------------------------------------------------------------------------------------- judging


def results(program: Captured, values: Sequence[object], written: Sequence[int]) -> list[object]:
    """What a run on copies of these values gives: the outputs, then the inputs that it wrote."""
    given = _copies(program.gm.graph, values)
    with torch.no_grad():
        outputs = program.runnable(program.gm)(*given)
    return [*outputs, *(given[i] for i in written)]  # type: ignore[misc]  # a tuple


def _wrong(
    program: Captured, values: Sequence[object], written: Sequence[int], tolerance: float | None
) -> Callable[[list[object]], str | None]:
    """What says why results are wrong: by the tolerance, or by the accuracy rule."""
    eager = results(program, values, written)
    if tolerance is not None:
        return lambda ours: _apart(eager, ours, tolerance)
    try:
        exact = raise_to_fp64(_telling(program.gm, written))
    except ValueError as error:
        raise BisectError(f"the accuracy rule has no oracle here ({error}); give a tolerance") from error
    with torch.no_grad():
        oracle = list(exact(*values))
    floats = [x.dtype for x in eager if isinstance(x, torch.Tensor) and x.is_floating_point()]
    dtype = floats[0] if floats else torch.float32
    return lambda ours: judge(oracle, eager, ours, dtype).reason


def _apart(eager: Sequence[object], ours: Sequence[object], tolerance: float) -> str | None:
    """Why two results differ by more than a tolerance."""
    for i, (a, b) in enumerate(zip(eager, ours, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if a != b:
                return f"output {i} is {b!r}, not {a!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}"
        apart = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        if not apart <= tolerance and not torch.equal(a, b):
            return f"output {i} differs by {apart:.3g} > {tolerance:.3g}"
    return None


def _telling(gm: fx.GraphModule, written: Sequence[int]) -> fx.GraphModule:
    """The graph with the inputs that it writes as further outputs."""
    graph = g.copy_graph(gm.graph)
    output, inputs = g.output_node(graph), g.placeholders(graph)
    given = (*g.flat_arguments(output), *(inputs[i] for i in written))
    output.args = (given,)  # type: ignore[assignment]  # nodes and plain values
    return fx.GraphModule(gm, graph)


def _copies(graph: fx.Graph, values: Sequence[object]) -> list[object]:
    """Weights as they are, copies of the rest; inputs that share memory share it again."""
    memo: dict[int, object] = {}
    nodes = g.placeholders(graph)
    return [v if g.is_weight(node) else copy.deepcopy(v, memo) for node, v in zip(nodes, values, strict=True)]


def _cut(text: str) -> str:
    """The text's first lines."""
    lines: Iterator[str] = iter(text.splitlines())
    shown = [line for line, _ in zip(lines, range(LONGEST), strict=False)]
    more = len(text.splitlines()) - len(shown)
    return "\n".join([*shown, f"    # and {more} more lines"] if more > 0 else shown)
