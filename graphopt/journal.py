"""Write down a compilation: GRAPHOPT_DUMP=dir gets JSON lines and a numbered listing after each change."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from torch import fx

from graphopt.listing import listing
from graphopt.observe import Event, KernelChosen, Matched, Observer, PassEnded, PassStarted, Refused, Warned

VARIABLE = "GRAPHOPT_DUMP"
JOURNAL = "journal.jsonl"

log = logging.getLogger(__name__)


def from_environment() -> tuple[Observer, ...]:
    """Fresh observers for one compilation: the log, and a journal where GRAPHOPT_DUMP is set."""
    directory = os.environ.get(VARIABLE)
    return (Log(), Journal(Path(directory))) if directory else (Log(),)


class Log:
    """One debug line for each event, through `logging`: TORCH_LOGS="+graphopt" shows them."""

    def on_event(self, event: Event) -> None:
        """Log the event; warnings as warnings."""
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", sentence(event))


class Journal:
    """Writes each compilation to its own directory `root/<process id>-<number>`.

    In it: `journal.jsonl`, one JSON object an event (`event` names it, `at` is seconds since the start), and
    `00-captured.txt`, `01-canonicalize.txt`, ...: the graph before the first pass and after each that changed
    it. The directory is made at the first event, so that a compilation that never began leaves none. A disk
    that cannot be written stops the journal with one warning, never the compilation.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory: Path | None = None
        self._file: TextIO | None = None
        self._start = 0.0
        self._broken = False
        self._ended = False

    def on_event(self, event: Event) -> None:
        """Append the event; before the first pass and after a changing one also write the graph."""
        if self._broken:
            return
        try:
            self._write(event)
        except OSError as error:
            self._broken = True
            log.warning("the journal stops here: %s; set %s to a writable directory", error, VARIABLE)

    def _write(self, event: Event) -> None:
        if self._file is None or (isinstance(event, PassStarted) and event.index == 0 and self._ended):
            self._open()
        file: str | None = None
        if isinstance(event, PassStarted) and event.index == 0:
            file = self._list("00-captured", event.gm)
        if isinstance(event, PassEnded):
            self._ended = True
            if event.changed:
                file = self._list(f"{event.index + 1:02d}-{event.name}", event.gm)
        at = round(time.monotonic() - self._start, 6)
        entry = {"event": type(event).__name__, "at": at, **facts(event)}
        if file is not None:
            entry["listing"] = file
        assert self._file is not None
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()  # the journal of a compilation that crashes is the one that is wanted

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
        self.directory = new_directory(self.root)
        self._file = (self.directory / JOURNAL).open("w", encoding="utf-8")
        self._start, self._ended = time.monotonic(), False

    def _list(self, name: str, gm: fx.GraphModule) -> str:
        from graphopt.torch_private import trace_artifact

        assert self.directory is not None
        text = listing(gm.graph)
        (self.directory / f"{name}.txt").write_text(text, encoding="utf-8")
        trace_artifact(f"graphopt_{name}", text)
        return f"{name}.txt"

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def new_directory(root: Path) -> Path:
    """A directory `root/<process id>-<number>` that did not exist: several processes may share the root."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        path = root / f"{os.getpid()}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def facts(event: Event) -> dict[str, object]:
    """An event as JSON-able facts; of a graph only its number of nodes."""
    if isinstance(event, PassStarted):
        return {"name": event.name, "index": event.index, "nodes": len(event.gm.graph.nodes)}
    if isinstance(event, PassEnded):
        about = {"name": event.name, "index": event.index, "nodes": len(event.gm.graph.nodes)}
        return {**about, "changed": event.changed, "seconds": event.seconds}
    return asdict(event)


def sentence(event: Event) -> str:
    """An event as one line for the log."""
    match event:
        case PassStarted(name=name, index=index, gm=gm):
            return f"pass {index} {name} starts on {len(gm.graph.nodes)} nodes"
        case PassEnded(name=name, index=index, gm=gm, changed=changed, seconds=seconds):
            did = "changed the graph" if changed else "changed nothing"
            return f"pass {index} {name} {did}: {len(gm.graph.nodes)} nodes, {1000 * seconds:.1f} ms"
        case Matched(match=m):
            return f"{m.rule} matched {', '.join(m.nodes)} in {m.module_path or 'the graph'} [{m.id}]"
        case Refused(refusal=r):
            return f"{r.rule} refused {r.node} in {r.module_path or 'the graph'}: {r.reason}"
        case KernelChosen(node=node, op=op, kernel=kernel, reasons=reasons):
            return f"{node}: {op} runs as {kernel}" + (f"; not {'; '.join(reasons)}" if reasons else "")
        case Warned(message=message):
            return f"warning: {message}"
