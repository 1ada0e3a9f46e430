"""Types of the zoo in processes of their own: one that crashes, or takes too long, costs its row only.

A worker is `python -m graphopt.tools.zoo.workers`: a task (JSON) a line in, a row (JSON) a line out.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from graphopt.tools.zoo.row import Row

LIMIT = 600.0  # seconds for one type; the slowest take 30 on an idle machine
RENEWED = 30  # types a process takes: compiled code and caches of each stay in memory
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Worker:
    """A process that examines types, started when it is first needed and again after it died."""

    python: str = sys.executable
    root: Path | None = None  # put before the installed packages
    limit: float = LIMIT
    process: subprocess.Popen[str] | None = field(default=None, init=False)
    taken: int = field(default=0, init=False)
    errors: IO[str] | None = field(default=None, init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def examine(self, task: dict[str, object]) -> Row:
        """The row of the task's type; where the process dies or is too slow, a row that says so."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], self.limit)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = [process.stdout], ""
        if line:
            self.taken += 1
            return Row.from_dict(json.loads(line))
        reason = f"the process ended: {self._last_words()}" if ready else f"not done in {self.limit:.0f} s"
        self.close()
        return Row(str(task["type"]), str(task["group"]), broken=reason)

    def _running(self) -> subprocess.Popen[str]:
        if self.taken >= RENEWED:
            self.close()
        if self.process is None:
            path = [str(self.root)] if self.root else []
            path += [p for p in [os.environ.get("PYTHONPATH")] if p]
            env = {**os.environ, **THREADS, **({"PYTHONPATH": os.pathsep.join(path)} if path else {})}
            self.errors, self.taken = tempfile.TemporaryFile("w+"), 0  # noqa: SIM115  # closed with the process
            self.process = subprocess.Popen(
                [self.python, "-m", __spec__.name if __name__ == "__main__" else __name__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env,
                bufsize=1,
            )  # fmt: skip
        return self.process

    def _last_words(self) -> str:
        """The exit status and the last line of what a process said."""
        assert self.process is not None and self.errors is not None
        status = self.process.wait(10)
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        return f"status {status}" + (f", {said[-1][:200]}" if said else "")

    def close(self) -> None:
        """End the process; by whom of several threads, and how often, is the same."""
        with self.lock:
            process, self.process = self.process, None
            errors, self.errors = self.errors, None
            self.taken = 0
        if process is not None:
            process.kill()
            process.wait()
        if errors is not None:
            errors.close()


def examined(tasks: Sequence[dict[str, object]], workers: Sequence[Worker]) -> Iterator[Row]:
    """The rows of tasks, in the order in which they are done; the workers end with the last one."""
    waiting: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    done: queue.SimpleQueue[Row | BaseException] = queue.SimpleQueue()

    def work(worker: Worker) -> None:
        try:
            while True:
                done.put(worker.examine(waiting.get_nowait()))
        except queue.Empty:
            return
        except BaseException as error:
            done.put(error)
        finally:
            worker.close()

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in tasks:
            row = done.get()
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    """Serve tasks from the standard input. What libraries print goes to the errors."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from graphopt.tools.zoo.run import examine

    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        dtypes = [getattr(torch, name) for name in task["dtypes"]]
        row = examine(task["type"], dtypes, task["paddings"], thorough=task.get("thorough", False))
        print(json.dumps(row.to_dict()), file=out, flush=True)


if __name__ == "__main__":
    main()
