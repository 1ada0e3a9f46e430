"""Compile a model for a GPU that need not be there: its program, and its kernels in numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt import aot, defaults
from graphopt import graph as g
from graphopt.capture import Captured
from graphopt.expect import check_expected
from graphopt.launch import Launch
from graphopt.listing import listing
from graphopt.lowering.steps import Step, launches_per_layer, layer_of, steps
from graphopt.options import Options
from graphopt.report import Report
from graphopt.targets import Target, target_named
from graphopt.tools.explain import captured

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = ("BLOCK", "SPLIT", "GROUP", "STAGES")  # words of the constants that are a kernel's configuration


@dataclass(frozen=True)
class KernelRow:
    """One compiled kernel of a program.

    Attributes:
        name: the jit function's.
        configuration: its block sizes, warps and stages.
        launches: of one run of the program.
        per_layer: the most launches in one layer.
        compiled: registers, memory, instructions.
        faults: what `aot.faults` finds; empty for a good kernel.
    """

    name: str
    configuration: str
    launches: int
    per_layer: int
    compiled: aot.Compiled
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Compilation:
    """A program as lowered for a target.

    Attributes:
        target: its name.
        code: the program, one line a call; equal layers once.
        kernels: what it launches, the most often launched first.
        layers: block -> launches of one run; "" is what lies in none.
        torch: operator of torch -> how often one run calls it (those that compute).
        references: ops that have no kernel for the target -> how often.
        report: of the passes.
    """

    target: str
    code: str
    kernels: tuple[KernelRow, ...]
    layers: dict[str, int]
    torch: dict[str, int]
    references: dict[str, int]
    report: Report

    @property
    def per_layer(self) -> int:
        """The most launches that one layer takes."""
        return max((n for layer, n in self.layers.items() if layer), default=0)

    def to_json(self, indent: int | None = None) -> str:
        """Everything but the report, as JSON."""
        fields = asdict(self)
        del fields["report"]
        return json.dumps(fields, indent=indent)

    def summary(self) -> str:
        """One line: launches, kernels, layers."""
        total = sum(self.layers.values())
        in_layers = [n for layer, n in self.layers.items() if layer]
        text = f"{self.target}: {total} launches of {len(self.kernels)} kernels"
        if in_layers:
            text += f"; {len(in_layers)} layers of {_range(in_layers)}, {total - sum(in_layers)} outside"
        if self.torch:
            text += f"; torch runs {', '.join(f'{n} {name}' for name, n in self.torch.items())}"
        if self.references:
            text += f"; without a kernel: {', '.join(f'{n} {name}' for name, n in self.references.items())}"
        return text

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with a kernel, a line each: spills, local memory, too much shared memory."""
        return tuple(f"{k.name} ({k.configuration}): {fault}" for k in self.kernels for fault in k.faults)

    def __str__(self) -> str:
        rows = [_cells(row) for row in self.kernels]
        widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (HEADINGS, *rows)
        ]
        return "\n".join((self.summary(), *lines, *(f"fault: {fault}" for fault in self.faults)))

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
        for row in self.kernels:
            table.add_row(*map(Text, _cells(row)), style="bold red" if row.faults else "")
        faults = (Text(f"fault: {fault}", style="bold red") for fault in self.faults)
        return Group(Text(self.summary(), style="bold"), table, *faults)


HEADINGS = (
    "kernel",
    "configuration",
    "launches",
    "a layer",
    "registers",
    "shared B",
    "spills",
    "matrix",
    "16 B loads",
)


def _cells(row: KernelRow) -> tuple[str, ...]:
    made = row.compiled
    spilled = made.spills + made.stack
    return (
        row.name,
        row.configuration,
        str(row.launches),
        str(row.per_layer),
        str(made.registers),
        str(made.shared),
        str(spilled),
        " ".join(made.matrix) or "-",
        str(made.wide_loads),
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def compile_for(
    model: torch.nn.Module | Captured,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    target: str,
    options: Mapping[str, object] | None = None,
    cache: Path | None = None,
) -> Compilation:
    """Lower a model for a target and compile every kernel that one call would launch. Nothing runs.

    Args:
        model, args, kwargs: a call of the model; real, fake or meta tensors, of fixed shapes.
        target: a key of `graphopt.targets.TARGETS`.
        options: as of `torch.compile(..., options=...)`.
        cache: the folder of compiled kernels' records; None compiles anew.

    Raises:
        OptionError: an unknown target or option.
        CaptureRefused: the program is out of scope as a whole.
        PipelineError: it has symbolic shapes.
        ExpectError: fewer operators were recognised than the option `expect` says.
        CompileError: a kernel does not compile for the target.
    """
    goal = target_named(target)
    chosen = Options.parse({**(options or {}), "target": target})
    if isinstance(model, Captured):
        program = model
    else:
        program = captured(model, tuple(args), kwargs or {}, dynamic=False)
    lowered, report = defaults.pipeline(chosen).run(program, defaults.context(chosen))
    check_expected(report, chosen.expect)
    found = steps(lowered.gm, goal)
    return Compilation(
        target=target,
        code=listing(lowered.gm.graph, fold_layers=True),
        kernels=_kernels(found, goal, cache),
        layers=launches_per_layer(found),
        torch=_counted(s for s in found if not s.launches and not s.is_reference),
        references=_counted(s for s in found if s.is_reference),
        report=report,
    )


def _kernels(found: Sequence[Step], target: Target, cache: Path | None) -> tuple[KernelRow, ...]:
    """Compile each distinct launch once, and count."""
    places: dict[object, list[tuple[str, Launch]]] = {}
    for step in found:
        for launch in step.launches:
            places.setdefault(aot.variant(launch), []).append((layer_of(g.module_path(step.node)), launch))
    rows = []
    for uses in places.values():
        launch = uses[0][1]
        made = aot.compile_launch(launch, target, cache)
        by_layer = [layer for layer, _ in uses if layer]
        most = max((by_layer.count(layer) for layer in set(by_layer)), default=0)
        rows.append(
            KernelRow(launch.name, _configuration(launch), len(uses), most, made, aot.faults(made, target))
        )
    return tuple(sorted(rows, key=lambda row: (-row.launches, row.name)))


def _configuration(launch: Launch) -> str:
    """`64x128x64, 4 warps, 3 stages`."""
    shown = [v for name, v in launch.constants if any(word in name for word in SHOWN)]
    blocks = [str(v) for v in shown if type(v) is int and v > 1]  # a switch is no size
    options = dict(launch.options)
    words = ["x".join(blocks)] if blocks else []
    words.append(f"{options.get('num_warps', 4)} warps")
    if "num_stages" in options:
        words.append(f"{options['num_stages']} stages")
    return ", ".join(words)


def _counted(found: Iterable[Step]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in found:
        counts[g.op_name(step.node)] = counts.get(g.op_name(step.node), 0) + step.count
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
