"""The `torch.compile` backend: a Dynamo graph in, a callable out; whatever goes wrong, the user's program still runs."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from graphopt import torch_private
from graphopt.capture import from_dynamo
from graphopt.defaults import context, pipeline
from graphopt.errors import CaptureRefused, OptionError, StrictError
from graphopt.journal import from_environment
from graphopt.options import Options
from graphopt.report import Report
from graphopt.weights import WeightStore

log = logging.getLogger(__name__)

# Prepared weights of every graph in the process: the prefill and the decode graph of a model share theirs. Entries die
# with the tensors they were made from.
STORE = WeightStore()

_reports: deque[Report] = deque(maxlen=512)
_setting: list[Mapping[str, object]] = []  # the options of `enable`, innermost last: torch forwards none


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
    """
    if kwargs:
        raise OptionError(f"graphopt takes no argument {next(iter(kwargs))!r}; pass options={{...}}")
    given = options if options is not None else (_setting[-1] if _setting else {})
    chosen = Options.parse(given)
    report, run = _compile(gm, example_inputs, chosen)
    _reports.append(report)
    if run is not None:
        return run
    if chosen.strict:
        raise StrictError(report.fallback)
    warnings.warn(f"graphopt runs the original program: {report.fallback}", stacklevel=2)
    if _setting and options is None:  # a library asked for its own backend, and expects to be compiled
        return torch_private.inductor(gm, example_inputs)
    return gm.forward


def reports() -> tuple[Report, ...]:
    """The reports of the graphs compiled in this process, oldest first (the last 512)."""
    return tuple(_reports)


def clear_reports() -> None:
    """Forget the reports so far."""
    _reports.clear()


def _compile(
    gm: fx.GraphModule, examples: Sequence[object], options: Options
) -> tuple[Report, Callable[..., object] | None]:
    """The report, and the callable; None where the original has to run, with the reason in `report.fallback`."""
    reason = _out_of_scope(gm, examples)
    if reason:
        return Report(fallback=reason), None
    ctx = context(options, store=STORE, observers=from_environment())
    try:
        captured = from_dynamo(gm, examples)
        program, report = pipeline(options).run(captured, ctx)
    except CaptureRefused as refused:
        return Report(fallback=refused.reason), None
    except Exception as error:
        if options.strict:
            raise StrictError(f"internal failure: {type(error).__name__}: {error}") from error
        log.debug("internal failure", exc_info=True)
        return Report(fallback=f"internal failure: {type(error).__name__}: {error}"), None
    limit = torch_private.recompile_limit_reached()
    if limit:
        report.warnings = (*report.warnings, limit)
        warnings.warn(limit, stacklevel=4)
    return report, program.run or program.gm.forward


def _out_of_scope(gm: fx.GraphModule, examples: Sequence[object]) -> str:
    """Why this call has to run the original before anything is traced; empty if it need not."""
    if torch.is_grad_enabled() and torch_private.outputs_need_gradients(gm):
        return "gradients are enabled and needed; call the model under torch.no_grad()"
    for example in examples:
        if isinstance(example, torch.Tensor) and example.device.type == "meta":
            return "an input is on the meta device: nothing to run"
        if isinstance(example, torch.Tensor) and example.device.type not in ("cpu",):
            return f"an input is on {example.device}; this version lowers for the CPU only"
    return ""
