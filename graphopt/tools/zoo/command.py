"""`graphopt zoo`: examine types, compare them with a baseline, golden counts and another version."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from graphopt.tools.demo_clock import processor
from graphopt.tools.exits import or_error
from graphopt.tools.models import DTYPES, choice
from graphopt.tools.zoo import drift as drifting
from graphopt.tools.zoo.build import kinds, zoo_types
from graphopt.tools.zoo.row import Row
from graphopt.tools.zoo.run import PADDINGS
from graphopt.tools.zoo.table import details, lost, miscounted, read, table, totals, write, wrong
from graphopt.tools.zoo.workers import LIMIT, Worker, examined

Types = Annotated[list[str] | None, typer.Argument(help="Model types; all of the zoo where none is given.")]
Full = Annotated[Path | None, typer.Option("--json", help="Write the rows here, with all near misses.")]
Short = Annotated[Path | None, typer.Option("--short", help="Write them in short here, for --baseline.")]
Baseline = Annotated[Path | None, typer.Option(help="Fail where this file of --short or --json has more.")]
Golden = Annotated[Path | None, typer.Option(help="Fail where eager runs count otherwise than this table.")]
Update = Annotated[bool, typer.Option("--update", help="Write what eager runs count into --golden instead.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes; each takes about 1 GB.")]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="Once for each; float32 and bfloat16.")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds for one type.")]
Drift = Annotated[
    str | None,
    typer.Option(help="Another version of transformers: run there too, and say which rules match less."),
]

DTYPE = ("float32", "bfloat16")


def zoo(
    types: Types = None,
    full: Full = None,
    short: Short = None,
    baseline: Baseline = None,
    golden: Golden = None,
    update: Update = False,
    jobs: Jobs = 1,
    dtype: Dtypes = None,
    limit: Limit = LIMIT,
    drift: Drift = None,
) -> None:
    """Build tiny random models of transformers' types, compile and judge them, and count what is recognised.

    Exit status 1: a result is wrong, or something is less than the baseline or the golden table say.
    """
    or_error(
        lambda: _zoo(types or [], full, short, baseline, golden, update, jobs, dtype or DTYPE, limit, drift)
    )


def _zoo(
    types: Sequence[str],
    full: Path | None,
    short: Path | None,
    baseline: Path | None,
    golden: Path | None,
    update: bool,
    jobs: int,
    dtype: Sequence[str],
    limit: float,
    drift: str | None,
) -> None:
    known = kinds()
    asked = [choice(t, known, "model type") for t in types] if types else list(zoo_types())
    dtypes = [choice(d, DTYPES, "dtype") for d in dtype]
    before = read(baseline) if baseline else ()
    tasks: list[dict[str, object]] = [
        {
            "type": t,
            "group": known[t].group,
            "dtypes": dtypes,
            "paddings": list(PADDINGS),
            "thorough": drift is not None,
        }
        for t in asked
    ]
    workers, progress = [Worker(limit=limit) for _ in range(jobs)], _progress(len(tasks))
    rows: list[Row] = []
    for row in examined(tasks, workers):
        rows = sorted([*rows, row], key=lambda row: asked.index(row.type))
        progress(row)
        # After each: an hour's work is not lost with the last type.
        for path, written in ((full, rows), (short, [row.short() for row in rows])):
            if path:
                write(written, path, machine())
    Console().print(table(rows))
    typer.echo("\n".join(details(rows)))
    if golden and update:
        update_golden(rows, golden)
    if drift:
        there = drifting.rows_under(drift, tasks, jobs=jobs, limit=limit, say=_progress(len(tasks)))
        typer.echo(drifting.compared(rows, there, version("transformers"), drift))
    else:
        typer.echo(str(totals(rows)))
    faults = [*wrong(rows), *lost(rows, before)]
    faults += miscounted(rows, json.loads(golden.read_text())) if golden else []
    if faults:
        typer.echo("\n".join(faults), err=True)
        raise typer.Exit(1)


def update_golden(rows: Sequence[Row], path: Path) -> None:
    """Put what the rows' eager runs counted into the golden table; other types in it stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table |= {row.type: row.there for row in rows if row.broken is None}
    lines = ",\n".join(f'"{name}": {json.dumps(counts)}' for name, counts in sorted(table.items()))
    path.write_text(f"{{\n{lines}\n}}\n")


def machine() -> dict[str, str]:
    """What a result means nothing without."""
    return {"processor": processor(), "torch": torch.__version__, "transformers": version("transformers")}


def _progress(number: int) -> Callable[[Row], None]:
    """Tells each row on the errors: on one line at a terminal, line by line in a file."""
    done = 0

    def say(row: Row) -> None:
        nonlocal done
        done += 1
        text = f"{done}/{number} {row.type}"
        if sys.stderr.isatty():
            typer.echo(f"\r{text:<48}", nl=done == number, err=True)
        else:
            typer.echo(text, err=True)

    return say
