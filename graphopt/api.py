"""What users call besides `torch.compile`: optimize, enable, disable, refresh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch

from graphopt import backend
from graphopt.options import Options

M = TypeVar("M", bound=torch.nn.Module)


class Enabled(contextlib.AbstractContextManager["Enabled"]):
    """What `enable` returns: leaving it as a context manager is `disable`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable()


_stances: list[Callable[[], None]] = []


def enable(**options: object) -> Enabled:
    """Send every `torch.compile` in this process to graphopt: the library's own, HF `generate`, `generate_batch`.

    `with graphopt.enable(merge=False): ...` limits it to a block; enabling twice nests.

    Raises:
        OptionError: an unknown option or value; nothing is changed then.
    """
    Options.parse(options)
    backend._setting.append(dict(options))
    stance = torch.compiler.set_stance("default", force_backend="graphopt")
    _stances.append(lambda: stance.__exit__(None, None, None))
    return Enabled()


def disable() -> None:
    """Take the innermost `enable` back; does nothing if there is none."""
    if _stances:
        _stances.pop()()
        backend._setting.pop()


def optimize(model: M, **options: object) -> M:
    """Compile a model in place and return it: same interface, `generate()` works. Call it under `torch.no_grad()`.

    Its graphs (prefill, decode, a new length) share their prepared weights.

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
    del model  # every entry is dropped: preparing is cheap, and a stale weight is silent
    backend.STORE.refresh()
