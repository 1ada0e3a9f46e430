"""Memory that holds a rank's own heads alone, and the error where a graph reads it whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from graphopt.errors import ShardError


@dataclass(frozen=True)
class Held:
    """What a rank's graph does with memory that may hold the rank's own heads alone, by position.

    Attributes:
        whole: (position, name) of inputs of which other heads are read too.
        written: inputs that are left with the rank's own heads.
        returned: outputs that have the rank's own heads.
        passed: (output, input): what is true of that input is true of the output.
    """

    whole: tuple[tuple[int, str], ...] = ()
    written: tuple[int, ...] = ()
    returned: tuple[int, ...] = ()
    passed: tuple[tuple[int, int], ...] = ()


class Marks:
    """The memory that holds a rank's own heads alone, for as long as it lives."""

    def __init__(self) -> None:
        self._marked: dict[int, StorageWeakRef] = {}  # no other storage has the address while this is held
        self._room = 64

    def __len__(self) -> int:
        return len(self._marked)

    def has(self, x: object) -> bool:
        """Whether a tensor is, or is a view of, marked memory."""
        return isinstance(x, torch.Tensor) and _address(x) in self._marked

    def add(self, x: object) -> None:
        """Mark a tensor's memory."""
        if not isinstance(x, torch.Tensor):
            return
        if len(self._marked) >= self._room:
            self._marked = {k: ref for k, ref in self._marked.items() if not ref.expired()}
            self._room = max(64, 2 * len(self._marked))
        self._marked.setdefault(_address(x), StorageWeakRef(x.untyped_storage()))

    def check(self, does: Held, args: Sequence[object]) -> None:
        """Before a graph runs.

        Raises:
            ShardError: it would read other ranks' heads where there are none.
        """
        if not self._marked:
            return
        for i, name in does.whole:
            if self.has(args[i]):
                raise ShardError(
                    f"input {name!r} of a graph is a cache that holds this rank's heads alone, and the graph "
                    "reads all of them: a graph break lies between the cache's update and its attention, or "
                    "the attention is not recognised; compile with fullgraph=True to find the break, use "
                    "attn_implementation='sdpa', or run without 'shard'"
                )

    def note(self, does: Held, args: Sequence[object], result: object, passing: Sequence[bool]) -> None:
        """After a graph has run: what it wrote and returned."""
        for i in does.written:
            self.add(args[i])
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for at in does.returned:
            self.add(outputs[at])
        for (at, _), marked in zip(does.passed, passing, strict=True):
            if marked:
                self.add(outputs[at])

    def passing(self, does: Held, args: Sequence[object]) -> list[bool]:
        """Which of the inputs that are passed on are marked, before a graph runs."""
        return [self.has(args[i]) for _, i in does.passed]


def _address(x: torch.Tensor) -> int:
    """What identifies a tensor's memory."""
    found: int = x.untyped_storage()._cdata
    return found


MARKS = Marks()
