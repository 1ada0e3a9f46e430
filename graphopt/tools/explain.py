"""Say what graphopt makes of a model, without running it: what is recognised, what is not, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import fx

import graphopt.defaults as defaults
from graphopt import torch_private
from graphopt.capture import Captured, capture, from_dynamo
from graphopt.errors import CaptureRefused, OptionError
from graphopt.expect import check_expected
from graphopt.journal import from_environment
from graphopt.observe import Observer, PassStarted, emit
from graphopt.options import Options
from graphopt.pipeline import passes_named
from graphopt.report import RECOGNISED, Link, Report
from graphopt.tools.ask import ask
from graphopt.tools.snapshots import CAPTURED


def explain(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object],
    *args: object,
    expect: Mapping[str, int] | None = None,
    **kwargs: object,
) -> Report:
    """Capture a model on example inputs, canonicalize and recognise it, and report; nothing is lowered.

    The report answers questions, by `report.explain(rule=..., module=..., node=...)`.

    Args:
        model: what `graphopt.capture` takes; called with `args` and `kwargs` (real, fake or meta tensors).
        expect: how often operators have to be recognised at least, as {"attention": 32, "norm": 65}.

    Raises:
        CaptureRefused: the program is out of scope as a whole; the reason is in the error.
        OptionError: `expect` names no operator.
        ExpectError: fewer were recognised than expected; what nearly matched is in the error.
    """
    options = Options.parse({} if expect is None else {"expect": expect})
    program = captured(model, args, kwargs)
    _, report = defaults.pipeline(until=RECOGNISED).run(
        program, defaults.context(observers=from_environment())
    )
    check_expected(report, options.expect)
    report.link = Link(ask=partial(ask, program))
    return report


def road(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    until: str,
    observers: Sequence[Observer] = (),
    options: Options | None = None,
) -> Report:
    """Send a model down the pipeline of these options up to the pass named `until`, included, and report.

    With `until="captured"` no pass runs; the observers see the captured graph and the report is empty. Of a
    sharded model it is the first rank's program.

    Raises:
        OptionError: the pipeline has no such pass.
        CaptureRefused: as for `explain`.
    """
    order = stages(options)
    if until not in order:
        raise OptionError(f"no stage {until!r} in this pipeline; it has {', '.join(order)}")
    program = captured(model, args, kwargs)
    listening = (*from_environment(), *observers)
    if until == CAPTURED:
        emit(listening, PassStarted(order[1], 0, program.gm))
        return Report()
    _, report = defaults.pipeline(options, until=until).run(
        program, defaults.context(options, observers=listening)
    )
    return report


def captured(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    dynamic: bool | None = None,
) -> Captured:
    """The captured program; what torch.export cannot take (a StaticCache, say) comes through Dynamo.

    Nothing runs: Dynamo is stopped as soon as it has handed over the graph. `dynamic` as for `torch.compile`:
    False for fixed shapes even where the model was compiled for others before.
    """
    try:
        return capture(model, *args, **kwargs)
    except CaptureRefused as refused:
        if not isinstance(model, torch.nn.Module):
            raise
        found: list[Captured] = []

        def hand_over(gm: fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., object]:
            found.append(from_dynamo(gm, examples))
            raise _Stop

        # To look is not to compile: what the process has compiled before must not end it. Decorated models
        # share one function, so even other models count.
        more = torch_private.own_compilations()
        looked = torch.compile(model, backend=hand_over, fullgraph=True, dynamic=dynamic, **more)  # type: ignore[call-overload]  # options of torch
        try:
            with torch.no_grad():
                looked(*args, **kwargs)
        except Exception:  # Dynamo's own, or ours through Dynamo
            if not found:
                raise refused from None
        return found[0]


class _Stop(Exception):
    """Ends a compilation whose graph has been seen."""


def stages(options: Options | None = None) -> tuple[str, ...]:
    """The names of the graphs on the road: captured, and one for each pass that runs with these options."""
    return CAPTURED, *passes_named(defaults.pipeline(options).passes)
