"""The zoo under another version of transformers: which rules match less in one of the two, and why.

The other version lives in an environment of its own, made once, which sees this one's packages: only
transformers (and what it needs in another version) is installed into it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from platformdirs import user_cache_path

import graphopt
from graphopt.errors import OptionError
from graphopt.tools.zoo.row import SHOWN, Row
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
    """What differs between two versions, type by type, with the nearest miss of each rule that is lost."""
    other = {row.type: row for row in there}
    lines = [f"transformers {version_here} against {version_there}"]
    for row in here:
        old = other.get(row.type)
        if old is None or (row.broken and old.broken):
            continue
        if row.broken or old.broken:
            where, said = (version_here, row.broken) if row.broken else (version_there, old.broken)
            lines.append(f"{row.type}: not in {where}: {said}")
            continue
        lines += _less(row, old, version_here) + _less(old, row, version_there)
        if old.right != row.right:
            lines.append(f"{row.type}: wrong or not judged in {version_there if row.right else version_here}")
    if len(lines) == 1:
        lines.append("no rule matches less in either")
    return "\n".join(lines)


def _less(row: Row, other: Row, version: str) -> list[str]:
    """The parts of which a row recognises fewer than another does, and the rules that went missing."""
    parts = [
        f"{row.type}: {what} {row.found(what)} of {row.there.get(what, 0)} in {version}, "
        f"{other.found(what)} of {other.there.get(what, 0)} in the other"
        for what in SHOWN
        if row.there.get(what, 0) - row.found(what) > other.there.get(what, 0) - other.found(what)
    ]
    if not parts:
        return []
    rules: dict[str, str] = {}
    for name, run in row.runs.items():
        matched = other.runs[name].matched if name in other.runs else {}
        for rule in matched.keys() - run.matched.keys():
            rules[rule] = f"    {rule} is lost: {run.misses.get(rule, 'it came nowhere near')}"
    return [*parts, *sorted(rules.values())]
