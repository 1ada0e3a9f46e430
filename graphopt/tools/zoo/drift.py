"""The zoo under another version of transformers: what is right or recognised in one of the two only, and why.

The other version lives in an environment of its own, made once, which sees this one's packages: only
transformers (and what it needs in another version) is installed into it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from platformdirs import user_cache_path

import graphopt
from graphopt.errors import OptionError
from graphopt.tools.zoo.row import NEAR, SHOWN, Row, Run
from graphopt.tools.zoo.table import totals
from graphopt.tools.zoo.workers import Worker, examined


def environment(wanted: str, home: Path | None = None) -> Path:
    """The interpreter of an environment with that version of transformers; made where it is not there yet.

    Raises OptionError where the version cannot be installed.
    """
    folder = (home or user_cache_path("graphopt")) / f"transformers-{wanted}-{sysconfig.get_python_version()}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    _call([sys.executable, "-m", "venv", "--without-pip", str(folder)], wanted)
    inner = next((folder / "lib").glob("python*")) / "site-packages"
    # What this interpreter imports from comes after the environment's own packages.
    (inner / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    _call(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install",
         "--quiet", f"transformers=={wanted}"],
        wanted,
    )  # fmt: skip
    ready.touch()
    return python


def _call(command: Sequence[str], wanted: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OptionError(
            f"no environment with transformers {wanted}: {said[-1] if said else done.returncode}; "
            "give a version that pip can install"
        )


def rows_under(
    wanted: str,
    tasks: Sequence[dict[str, object]],
    *,
    jobs: int,
    limit: float,
    say: Callable[[Row], None],
    home: Path | None = None,
) -> list[Row]:
    """The rows of tasks under that version; a type that it does not have is broken there."""
    python, root = environment(wanted, home), Path(graphopt.__path__[0]).parent
    rows = []
    for row in examined(tasks, [Worker(str(python), root, limit) for _ in range(jobs)]):
        say(row)
        rows.append(row)
    return rows


def compared(here: Sequence[Row], there: Sequence[Row], version_here: str, version_there: str) -> str:
    """The totals of two versions, and what differs, type by type: what one recognises less, and why."""
    other = {row.type: row for row in there}
    lines = []
    for row in here:
        old = other.get(row.type)
        if old is None or (row.broken and old.broken):
            continue
        if row.broken or old.broken:
            where, said = (version_here, row.broken) if row.broken else (version_there, old.broken)
            lines.append(f"{row.type}: not in {where}: {said}")
            continue
        for less, more, name, name_more in (
            (row, old, version_here, version_there),
            (old, row, version_there, version_here),
        ):
            lines += _less(less, more, name, name_more)
            lines += _wrong(less, more, name, name_more)
    sums = [f"transformers {v}: {totals(rows)}" for v, rows in ((version_here, here), (version_there, there))]
    return "\n".join([*sums, *(lines or ["no rule is lost in either, and both give the same right results"])])


def _less(row: Row, other: Row, version: str, version_other: str) -> list[str]:
    """The parts of which a row recognises fewer than another does, and the rules that went missing."""
    parts = [
        f"{row.type}: {what} {row.found(what)} of {row.there.get(what, 0)} in {version}, "
        f"{other.found(what)} of {other.there.get(what, 0)} in {version_other}"
        for what in SHOWN
        if row.there.get(what, 0) - row.found(what) > other.there.get(what, 0) - other.found(what)
    ]
    if row.decoded and other.decoded and not parts:
        parts += [
            f"{row.type}: decoding, {what} {found} in {version}, {full} in {version_other}"
            for what in SHOWN
            if (found := row.decoded.found.get(what, 0)) < (full := other.decoded.found.get(what, 0))
            and 0 < row.there.get(what, 0) == other.there.get(what, 0)
        ]
    if not parts:
        return []
    lost: dict[str, str] = {}
    runs, others = row.every(), other.every()
    for name in [name for name in runs if name in others]:
        run, wanted = runs[name], others[name]
        if run.graphs != wanted.graphs:
            breaks = "".join(f"; graph break: {text}" for text in run.ends[:NEAR])
            number = f"{run.graphs} graphs in {version}, {wanted.graphs} in {version_other}"
            parts.append(f"    {name}: {number}{breaks}")
        for rule, text in _lost_rules(run, wanted, version, version_other):
            lost.setdefault(rule, text)
    return [*parts, *lost.values()]


def _lost_rules(run: Run, other: Run, version: str, version_other: str) -> Iterator[tuple[str, str]]:
    """Rules that match less, in the order of matching: a later one may have lost what an earlier one made.

    Each with where it matched, and the node that differs where it came nearest now.
    """
    order = list(other.places)
    for rule in sorted(other.matched, key=lambda r: order.index(r) if r in order else len(order)):
        before, now = other.matched[rule], run.matched.get(rule, 0)
        if now < before:
            miss = run.misses.get(rule, "no near miss")
            was = f", at {other.places[rule]}" if rule in other.places else ""
            found = f"{before} in {version_other}{was}; {now} in {version}, nearest: {miss}"
            yield rule, f"    {rule} is lost: {found}"


def _wrong(row: Row, other: Row, version: str, version_other: str) -> Iterator[str]:
    """The runs, the decoding too, that are right in the other version only."""
    runs, others = row.every(), other.every()
    for name in [name for name in runs if name in others]:
        run = runs[name]
        if others[name].right and not run.right:
            said = "; ".join([*run.wrong, *run.refused]) or "not judged"
            yield f"{row.type} ({name}): right in {version_other} only; in {version}: {said}"
    if other.decoded and not row.decoded:
        said = row.undecoded or "it does not generate"
        yield f"{row.type}: decoded in {version_other} only; in {version}: {said}"
