"""What the zoo found: as a table, as JSON, against a baseline and against the golden counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import OptionError
from graphopt.tools.zoo.row import SHOWN, TOKENS, Row

if TYPE_CHECKING:
    from rich.table import Table

WATCHED = (*SHOWN, "linear")  # a match of these must not get lost


def table(rows: Sequence[Row]) -> Table:
    """A line a type: recognised of there, graphs, unmatched FLOPs, whether all runs are right, seconds."""
    from rich.table import Table

    shown = Table(*("type", *SHOWN, "graphs", "unmatched", "right", "s"), box=None, pad_edge=False)
    for row in rows:
        if row.broken is not None:
            shown.add_row(row.type, *[""] * (len(SHOWN) + 2), f"[red]broken[/]: {row.broken}", "")
            continue
        runs = row.runs.values()
        shares = max((sum(run.unmatched.values()) for run in runs), default=0.0)
        shown.add_row(
            row.type,
            *(_fraction(row, what) for what in SHOWN),
            str(max((run.graphs for run in runs), default=0)),
            f"{shares:.0%}",
            _verdict(row),
            f"{row.seconds:.0f}",
        )
    return shown


def _verdict(row: Row) -> str:
    if not row.right:
        return "[bold red]no[/]"
    return "as written" if any(run.handed_back for run in row.every().values()) else "yes"


def _fraction(row: Row, what: str) -> str:
    there, found = row.there.get(what, 0), row.found(what)
    if not there:
        return ""
    return f"{found}/{there}" if found == there else f"[yellow]{found}/{there}[/]"


def details(rows: Iterable[Row]) -> list[str]:
    """What the table has no room for: wrong results, refusals, near misses of what is not recognised."""
    lines = []
    for row in rows:
        said: dict[str, list[str]] = {}
        for name, run in row.every().items():
            for kind, texts in (("wrong", run.wrong), ("not ours", run.refused)):
                for text in texts:
                    said.setdefault(f"{kind}: {text}", []).append(name)
            if run.recompiled:
                said.setdefault(f"compiled again at an equal call: {run.recompiled} graphs", []).append(name)
        if row.undecoded:
            said[f"not decoded, for eager raises {row.undecoded}"] = ["float32"]
        lines += [f"{row.type} ({', '.join(names)}): {text}" for text, names in said.items()]
        if short := row.missing():
            lines += [f"{row.type}: short of {', '.join(short)}; nearest misses:", *_near(row)]
        lines += _short_decoding(row)
    return lines


def _short_decoding(row: Row) -> list[str]:
    """What the calls of a decoder without an encoder recognise less than the same calls without a cache."""
    if row.decoded is None or row.group != "causal LM":
        return []
    less = [
        f"{what} {found} of {TOKENS * row.found(what)}"
        for what in SHOWN
        if (found := row.decoded.found.get(what, 0)) < TOKENS * row.found(what)
    ]
    return [f"{row.type}: decoding recognises less: {', '.join(less)}"] if less else []


def _near(row: Row) -> list[str]:
    return [f"    {text}" for text in row.near()]


@dataclass(frozen=True)
class Totals:
    """Sums over rows: {what: (recognised, there)}."""

    types: int
    built: int
    right: int
    decoded: int
    kinds: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        parts = [f"{what} {_percent(*self.kinds[what])}" for what in SHOWN]
        types = f"{self.types} types, {self.built} built, {self.right} right, {self.decoded} decoded"
        return f"{types}; recognised: {', '.join(parts)}"


def _percent(found: int, there: int) -> str:
    return f"{found / there:.1%} of {there}" if there else "none there"


def totals(rows: Sequence[Row]) -> Totals:
    """How many types build, how many are right, and what is recognised over all of them."""
    kinds = {
        what: (sum(row.found(what) for row in rows), sum(row.there.get(what, 0) for row in rows))
        for what in SHOWN
    }
    built = [row for row in rows if row.broken is None]
    decoded = sum(row.decoded is not None and row.decoded.right for row in rows)
    return Totals(len(rows), len(built), sum(row.right for row in rows), decoded, kinds)


# --------------------------------------------------------------------------------------------- comparing


def write(rows: Sequence[Row], path: Path, machine: Mapping[str, str]) -> None:
    """Write rows as JSON, with the versions they come from; `read` reads them back."""
    ordered = sorted(rows, key=lambda row: row.type)
    lines = ",\n".join(json.dumps(row.to_dict()) for row in ordered)  # a line a row: diffs stay readable
    path.write_text(f'{{"machine": {json.dumps(dict(machine))},\n"rows": [\n{lines}\n]}}\n')


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a file. Raises OptionError for any other file."""
    try:
        return tuple(Row.from_dict(values) for values in json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} is no zoo ({error}); make one with graphopt zoo --json {path}") from error


def wrong(rows: Iterable[Row]) -> list[str]:
    """The types with a wrong result, an exception at run time, or a graph that was not judged; and why."""
    found = []
    for row in rows:
        for name, run in row.every().items():
            found += [f"{row.type} ({name}) is wrong: {text}" for text in run.wrong]
            if not run.right and not run.wrong:
                found.append(f"{row.type} ({name}) is not judged: {'; '.join(run.refused) or 'no graph'}")
    return found


def lost(rows: Iterable[Row], baseline: Iterable[Row]) -> list[str]:
    """What the baseline has and these rows have not: a type, a right result, a part; in sentences."""
    before = {row.type: row for row in baseline}
    found = []
    for row in rows:
        old = before.get(row.type)
        if old is None or old.broken is not None:
            continue
        if row.broken is not None:
            found.append(f"{row.type} is broken: {row.broken}")
            continue
        if old.right and not row.right:
            found.append(f"{row.type} is no longer right: {'; '.join(_faults(row))}")
        for what in WATCHED:
            if row.found(what) < min(old.found(what), row.there.get(what, 0)):
                numbers = f"{old.found(what)} -> {row.found(what)}"
                found.append("\n".join([f"{row.type}: {what} {numbers}; nearest misses now:", *_near(row)]))
    return found


def _faults(row: Row) -> list[str]:
    return [text for run in row.every().values() for text in (*run.wrong, *run.refused)] or ["not judged"]


def miscounted(rows: Iterable[Row], golden: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Where an eager run counts something else than the golden table, in sentences."""
    return [
        f"{row.type}: an eager run counts {dict(row.there)}, the golden table {dict(golden[row.type])}"
        for row in rows
        if row.broken is None and row.type in golden and dict(row.there) != dict(golden[row.type])
    ]
