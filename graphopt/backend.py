"""The `torch.compile` backend: a Dynamo graph in, a callable out; whatever goes wrong, the model runs."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from graphopt import graph as g
from graphopt import targets, torch_private
from graphopt.capture import Captured, from_dynamo
from graphopt.certificates import Certificates, default_folder
from graphopt.errors import (
    CaptureRefused,
    ExpectError,
    GraphoptError,
    OptionError,
    ReleasedError,
    StrictError,
    WeightError,
)
from graphopt.expect import check_expected
from graphopt.journal import from_environment
from graphopt.live import Live
from graphopt.observe import Observer, Warned, emit
from graphopt.options import Options
from graphopt.report import Report
from graphopt.runtime.ranks import RankError, mesh_of
from graphopt.steering import Steering
from graphopt.weights import WeightStore

log = logging.getLogger(__name__)

# Prepared weights of every graph in the process: the prefill and the decode graph of a model share theirs.
# Entries die with the tensors they were made from.
STORE = WeightStore()
# Which rewrites have been verified, in this process and, by its files, in earlier ones.
CERTIFICATES = Certificates(default_folder())

_reports: deque[Report] = deque(maxlen=512)

_steering = Steering()  # process-wide, as `enable` is: `graphopt bisect` sets it in the processes it starts


def graphopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    **kwargs: object,
) -> Callable[..., object]:
    """The backend that `torch.compile(model, backend="graphopt", options={...})` calls for each graph.

    Args:
        gm, example_inputs: what Dynamo hands over.
        mode: accepted because libraries send one ("reduce-overhead"); graphopt has no modes.
        options: see `graphopt.options.Options`.

    Raises:
        OptionError: an unknown option or value.
        StrictError: under `strict`, where it would otherwise fall back.
        ExpectError: fewer operators were recognised than `expect` says.
    """
    if kwargs:
        raise OptionError(f"graphopt takes no argument {next(iter(kwargs))!r}; pass options={{...}}")
    return _build(gm, example_inputs, Options.parse(options), fall_back=lambda gm, _: gm.forward)


@dataclass(frozen=True)
class Forced:
    """The backend that `enable` puts in the place of every other; what it cannot do goes to Inductor.

    A library that compiles by itself expects to be compiled. Torch forwards none of that call's own options.
    Torch keeps compiled code by the equality of backends: enabled again with equal options, nothing is
    compiled again; with others, nothing old is used.
    """

    options: Options

    compiler_name: ClassVar[str] = "graphopt"  # for torch's messages

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[object], **kwargs: object
    ) -> Callable[..., object]:
        """As `graphopt`."""
        return _build(gm, example_inputs, self.options, fall_back=_inductor)


def reports() -> tuple[Report, ...]:
    """The reports of the graphs compiled in this process, oldest first (the last 512)."""
    return tuple(_reports)


def clear_reports() -> None:
    """Forget the reports so far."""
    _reports.clear()


def steer(steering: Steering) -> None:
    """Take rewrites away from every later compilation of this process; `Steering()` gives them back."""
    global _steering
    _steering = steering


@dataclass
class Guarded:
    """What a compiled graph runs as: our program; where that fails and the original does not, the original.

    Attributes:
        live: our program, which may be built again.
        original: the program that Dynamo recorded.
        writes: whether a run may change its inputs. After half a run, the original would then start from
            another state: the failure is raised instead.
        run: what is called: our program as it was when it was last looked at, until it has failed.
        broken: whether it has failed by an error.
    """

    live: Live
    original: Callable[..., object]
    writes: bool
    run: Callable[..., object] = field(init=False)
    broken: bool = field(default=False, init=False)
    _admitted: dict[tuple[int, ...], int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.run = self.live.built.run

    def __call__(self, *args: object) -> object:
        """Run on the graph's inputs and weights, in placeholder order."""
        if self.live.waiting and not self.broken:
            return self._run_anew(args)
        if STORE.owners:
            self._admit(args)
        try:
            return self.run(*args)
        except Exception as error:
            return self._recover(args, error)

    def _run_anew(self, args: tuple[object, ...]) -> object:
        """Let the program be verified or built again, and run what came out."""
        try:
            self.live.catch_up(args, self.original, self._look)
        except (StrictError, ExpectError):
            raise
        except Exception as error:
            return self._recover(args, error, ran=False)
        try:
            if STORE.owners:
                self._admit(args)
            result = self.run(*args)
        except ReleasedError:
            if self.live.restore():  # what was taken back needs weights that are gone
                self._look()
            raise
        except Exception as error:
            return self._recover(args, error)
        self.live.settle()
        return result

    def _look(self) -> None:
        """Take the program as it is now; the original, where that gives other numbers."""
        self.run = self.original if self.live.wrong else self.live.built.run
        self._admitted.clear()

    def _admit(self, args: tuple[object, ...]) -> None:
        """Weights that are read as they are must not have been released; looked at once for each set."""
        reads = tuple(args[i] for i in self.live.built.reads)
        identities = tuple(map(id, reads))
        generation = STORE.owners.generation  # unchanged, no weight has been given a stand-in since
        if self._admitted.get(identities) != generation:
            STORE.admit(args if self.run is self.original else reads)
            self._admitted[identities] = generation

    def _recover(self, args: tuple[object, ...], error: Exception, *, ran: bool = True) -> object:
        """The original's result, if it has one; unless our program `ran`, inputs are what they were."""
        halfway = ran and self.writes
        if self.run is self.original or halfway or _is_bad_weight(error) or isinstance(error, RankError):
            raise error
        if isinstance(error, ReleasedError):
            raise error
        if STORE.owners:
            STORE.admit(args)
        try:
            result = self.original(*args)
        except Exception as own:  # an index out of range, say: the program's error, as in eager
            raise own from None
        reason = _described(error)
        self.live.report.fallback = reason
        if self.live.strict:
            raise StrictError(reason) from error
        log.debug("failed at run time", exc_info=error)
        self.run, self.broken = self.original, True
        warnings.warn(_says(reason), stacklevel=3)
        return result


# ------------------------------------------------------------------------------------------------ compiling


def _build(
    gm: fx.GraphModule,
    examples: Sequence[object],
    options: Options,
    fall_back: Callable[[fx.GraphModule, Sequence[object]], Callable[..., object]],
) -> Callable[..., object]:
    """Compile, keep the report, warn; or what falls back gives."""
    device = _device(examples)
    _check_target(options.target, device)
    mesh = mesh_of(options.shard)
    observers = from_environment()
    report = Report()
    live, failure = None, None
    report.fallback = _out_of_scope(gm, examples)
    if report.fallback is None:
        try:
            captured = from_dynamo(gm, examples)
            _name_as_owned(captured.gm, examples)
            parameters = frozenset(i for i, x in enumerate(examples) if isinstance(x, torch.nn.Parameter))
            place = (device, mesh, STORE, CERTIFICATES)
            live = Live(captured, options, *place, observers, parameters, _steering)
            report = live.report
        except OptionError:
            raise  # an option that this program cannot have: the user has to know, not to get another program
        except Exception as error:
            if mesh is not None and not isinstance(error, CaptureRefused):
                raise  # the other ranks would wait for this one
            failure, report.fallback = error, _described(error)
            log.debug("compilation failed", exc_info=True)
    report.ends = torch_private.graph_end(gm)
    _reports.append(report)
    if not _steering.takes:
        check_expected(report, options.expect)
    if live is None:
        return _without_us(gm, examples, options, report, failure, observers, fall_back)
    _note_recompile_limit(report, observers)
    for message in report.warnings:
        warnings.warn(message, stacklevel=3)
    _note_weights(live, examples)
    return Guarded(live, gm.forward, _writes(captured))


def _without_us(
    gm: fx.GraphModule,
    examples: Sequence[object],
    options: Options,
    report: Report,
    failure: Exception | None,
    observers: Sequence[Observer],
    fall_back: Callable[[fx.GraphModule, Sequence[object]], Callable[..., object]],
) -> Callable[..., object]:
    """The fall-back, with one warning; under `strict`, an error."""
    assert report.fallback is not None
    if options.strict:
        raise StrictError(report.fallback) from failure
    emit(observers, Warned(_says(report.fallback)))
    warnings.warn(_says(report.fallback), stacklevel=4)
    run = fall_back(gm, examples)
    if not STORE.owners:
        return run

    def admitted(*args: object) -> object:
        STORE.admit(args)
        return run(*args)

    return admitted


def _name_as_owned(gm: fx.GraphModule, examples: Sequence[object]) -> None:
    """Add the names that weights have in the model that owns them: a part that is called alone has its own.

    What users and plans call a weight then means it in both graphs.
    """
    names = STORE.owners.names()
    for node, weight in zip(g.placeholders(gm.graph), examples, strict=True):
        known, owned = g.weight_names(node), names.get(id(weight))
        if known and owned is not None and owned not in known:
            g.set_weight_names(node, (*known, owned))


def _note_weights(live: Live, examples: Sequence[object]) -> None:
    """What a program reads in another layout only may leave its place."""
    for i in live.parameters & live.built.moves - set(live.built.reads):
        weight = examples[i]
        assert isinstance(weight, torch.nn.Parameter)
        STORE.owners.leaving.add(weight)


def _inductor(gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
    """What Inductor makes of a graph; the original where it fails, as it does on some that run in eager."""
    original = fx.GraphModule(gm, g.copy_graph(gm.graph))  # Inductor may edit a graph before it fails
    try:
        return torch_private.inductor(gm, examples)
    except Exception as error:
        if torch_private.steers_dynamo(error):
            raise
        log.debug("Inductor failed", exc_info=True)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"Inductor fails too ({reason}): the program runs in eager", stacklevel=5)
        return original.forward


def _described(error: Exception) -> str:
    """Why the original runs, for the report: a refusal's reason, or that something of ours broke."""
    if isinstance(error, CaptureRefused):
        return error.reason
    if isinstance(error, StrictError):
        return str(error)
    kind = "" if isinstance(error, GraphoptError) else f"{type(error).__name__}: "
    return f"internal failure: {kind}{error}"


def _is_bad_weight(error: Exception) -> bool:
    """Whether a weight has values that an option asked for cannot hold: NaN in int8."""
    return isinstance(error, WeightError) and isinstance(error.__cause__, ValueError)


def _says(reason: str) -> str:
    return f"graphopt runs the original program: {reason}"


def _note_recompile_limit(report: Report, observers: Sequence[Observer]) -> None:
    """After the last compilation that torch allows, the next new shape would silently be eager."""
    message = torch_private.recompile_limit_reached()
    if message:
        report.warnings = (*report.warnings, message)
        emit(observers, Warned(message))


def _device(examples: Sequence[object]) -> torch.device:
    """Where a program runs: the first device that is no CPU, on which scalars may lie in any program."""
    devices = [e.device for e in examples if isinstance(e, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _check_target(target: str, device: torch.device) -> None:
    """Raise OptionError where code for the target does not run on the device."""
    if target != "auto" and (target == targets.CPU) != (device.type == "cpu"):
        raise OptionError(
            f"option target is {target!r}, but the inputs are on {device}; leave it out, or compile without "
            "running by `graphopt compile`"
        )


def _writes(captured: Captured) -> bool:
    """Whether a program may change its inputs: conservatively, whether it has an operator in place."""
    return any(g.is_mutable(node.target) for node in captured.gm.graph.nodes)


def _out_of_scope(gm: fx.GraphModule, examples: Sequence[object]) -> str | None:
    """Why this call has to run the original before anything is traced."""
    if torch_private.outputs_need_gradients(gm):
        return "gradients are enabled and needed; call the model under torch.no_grad()"
    for example in examples:
        if isinstance(example, torch.Tensor) and example.device.type == "meta":
            return "an input is on the meta device: nothing to run"
        if isinstance(example, torch.Tensor) and example.device.type not in ("cpu", "cuda"):
            return f"an input is on {example.device}; targets are {', '.join(targets.NAMES)}"
    return None
