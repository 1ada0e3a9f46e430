"""Run pieces of work at once, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

PATIENCE = 300  # seconds; a thread that is not done by then waits for another


def in_threads(*work: Callable[[], object]) -> None:
    """Run all at once; raise what the first of them raised, or that one of them hangs."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(task: Callable[[], object]) -> None:
        try:
            start.wait()
            with torch.no_grad():
                task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "deadlock"
