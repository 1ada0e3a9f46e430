"""What users call besides `torch.compile`: optimize, enable, disable, refresh."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TypeVar

import torch

from graphopt import backend
from graphopt.options import Options

M = TypeVar("M", bound=torch.nn.Module)


class Enabled(contextlib.AbstractContextManager["Enabled"]):
    """What `enable` returns: leaving it as a context manager takes that `enable` back, and those after it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._stance = torch.compiler.set_stance("default", force_backend=backend.Forced(options))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self in _enabled:
            disable()

    def _take_back(self) -> None:
        self._stance.__exit__(None, None, None)  # restores what was forced before

    def __repr__(self) -> str:
        return f"Enabled({self.options})"


_enabled: list[Enabled] = []  # innermost last; process-wide, as torch's own stance is


def enable(**options: object) -> Enabled:
    """Send every `torch.compile` in this process to graphopt: a library's, HF `generate`, `generate_batch`.

    `with graphopt.enable(merge=False): ...` limits it to a block; enabling twice nests. All threads are
    included. These options stand in for those of a `torch.compile(..., options=...)`: torch forwards none.

    Raises:
        OptionError: an unknown option or value; nothing is changed then.
    """
    enabled = Enabled(Options.parse(options))
    _enabled.append(enabled)
    return enabled


def disable() -> None:
    """Take the innermost `enable` back; does nothing if there is none."""
    if _enabled:
        _enabled.pop()._take_back()


def optimize(model: M, **options: object) -> M:
    """Compile a model in place and return it: same interface, `generate()` works.

    Call it under `torch.no_grad()`. Its graphs (prefill, decode, a new length) share their prepared weights.

    Raises:
        OptionError: an unknown option or value; nothing is changed then.
    """
    Options.parse(options)
    model.compile(backend="graphopt", options=dict(options))
    return model


def refresh(model: torch.nn.Module | None = None) -> None:
    """Prepare weights anew at the next call: after writes that leave no trace (`p.data.mul_()`, numpy views).

    Args:
        model: whose weights changed; None for all models.
    """
    backend.STORE.refresh(None if model is None else (*model.parameters(), *model.buffers()))
