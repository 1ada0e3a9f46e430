"""Bisect a user's command: it runs as it is, in processes whose compilations leave some rewrites out.

A folder with a `sitecustomize.py` and a plan comes first on PYTHONPATH. Every Python that the command starts
reads it, and steers graphopt by the plan as soon as that is imported; nothing of the command is edited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from graphopt import backend
from graphopt.errors import BisectError
from graphopt.observe import Event, PassEnded, PassStarted
from graphopt.steering import Steering
from graphopt.tools.bisect import Bisection, bisection
from graphopt.tools.culprits import MOST, Recorder, Rewrite, Trial, find
from graphopt.tools.functions import Functions, Shower

PLAN, TOLD = "plan.json", "told"
SITE = '''"""Made by `graphopt bisect`: steers graphopt by the plan beside this file, once it is imported."""
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)


class Hook:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "graphopt.backend":
            return None
        sys.meta_path.remove(Hook)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            from graphopt.tools.bisect_command import steer_here

            steer_here(Path(HERE))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hook)
others = [p for p in sys.path if p and str(Path(p).resolve()) != HERE]
hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", others)  # the environment's own
if hidden is not None:
    hidden.loader.exec_module(importlib.util.module_from_spec(hidden))
'''


def bisect_command(
    command: Sequence[str], *, most: int = MOST, timeout: float | None = None, cwd: Path | None = None
) -> Bisection:
    """The smallest set of rewrites with which a command's exit status is not 0.

    Args:
        command: program and arguments, as `("python", "check.py")`.
        most: how often it may run.
        timeout: seconds for one run; a longer one counts as broken.
        cwd: where it runs.

    Raises:
        BisectError: it fails without any rewrite too, has two results for one set of rewrites, compiles
            nothing, cannot be started, or `most` was not enough.
    """
    with TemporaryDirectory(prefix="graphopt-bisect-") as folder:
        subject = _Command(tuple(command), Path(folder), timeout, cwd)
        (subject.folder / "sitecustomize.py").write_text(SITE, encoding="utf-8")
        found = find(subject.run, most)
        if found is None:
            return Bisection()
        functions = subject.shown(found.steering, [r.key for r in found.culprits])
    return bisection(found, functions)


@dataclass(frozen=True)
class _Command:
    """A command that is run again and again."""

    command: tuple[str, ...]
    folder: Path
    timeout: float | None
    cwd: Path | None

    def run(self, steering: Steering) -> Trial:
        """Run it, steered: broken where its exit status is not 0."""
        status, said = self.started(steering, ())
        recorder = Recorder()
        for entry in self.told():
            recorder.passes.update(dict.fromkeys(entry.get("passes", ())))
            for fields in entry.get("rewrites", ()):
                recorder.keep(Rewrite(**{**fields, "needs": tuple(fields["needs"])}))
        broken = None if status == 0 else f"exit status {status}" + (f" ({said})" if said else "")
        return Trial(broken, tuple(recorder.rewrites.values()), tuple(recorder.passes))

    def shown(self, steering: Steering, keys: Sequence[str]) -> dict[str, Functions]:
        """Run it once more, for the functions of the rewrites with these keys."""
        self.started(steering, keys)
        return {k: Functions(*f) for entry in self.told() for k, f in entry.get("functions", {}).items()}

    def started(self, steering: Steering, keys: Sequence[str]) -> tuple[int | str, str]:
        """Write the plan, run: the exit status, and the last line of what it said to stderr."""
        told = self.folder / TOLD
        told.mkdir(exist_ok=True)
        for old in told.iterdir():
            old.unlink()
        plan = {
            "deny": sorted(steering.deny),
            "skip": sorted(steering.skip),
            "kernels": sorted(steering.kernels),
            "show": list(keys),
        }
        (self.folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        paths = (str(self.folder), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            done = subprocess.run(
                self.command, env=environment, cwd=self.cwd, timeout=self.timeout, capture_output=True
            )
        except subprocess.TimeoutExpired:
            return f"none after {self.timeout:g} s", ""
        except OSError as error:
            raise BisectError(f"{' '.join(self.command)!r} cannot be started: {error}") from error
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return done.returncode, lines[-1] if lines else ""

    def told(self) -> Iterator[dict]:
        """What each process wrote down at last; one that was killed while it wrote has nothing to tell."""
        for path in sorted((self.folder / TOLD).glob("*.json")):
            yield json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------- in the command's process


def steer_here(folder: Path) -> None:
    """Steer this process by the plan in a folder, and write down there what its compilations do."""
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    shower = Shower(frozenset(plan["show"])) if plan["show"] else None
    teller = Teller(folder / TOLD / f"{os.getpid()}.json", Recorder(), shower)
    kernels = frozenset((op, kernel) for op, kernel in plan["kernels"])
    backend.steer(Steering(frozenset(plan["deny"]), frozenset(plan["skip"]), kernels, (teller,)))


@dataclass
class Teller:
    """Observes compilations and writes down all that is known so far, before and after each pass."""

    path: Path
    recorder: Recorder
    shower: Shower | None

    def on_event(self, event: Event) -> None:
        """Note it. A process that cannot write says so and goes on: the command must not fail by us."""
        self.recorder.on_event(event)
        if self.shower is not None:
            self.shower.on_event(event)
        if not isinstance(event, (PassStarted, PassEnded)):
            return
        state = {
            "passes": list(self.recorder.passes),
            "rewrites": [asdict(r) for r in self.recorder.rewrites.values()],
            "functions": {
                k: (f.before, f.after) for k, f in (self.shower.found if self.shower else {}).items()
            },
        }
        try:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            print(f"graphopt bisect: {self.path} cannot be written: {error}", file=sys.stderr)
