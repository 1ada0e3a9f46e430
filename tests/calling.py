"""Call a compiled program: its value, the warnings of ours during it, and the reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphopt import backend
from graphopt.report import Report


def compiled(
    model: Callable[..., object], strict: bool = True, **settings: object
) -> Callable[..., torch.Tensor]:
    return torch.compile(model, backend="graphopt", options={"strict": strict}, **settings)


def ours_among(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "torch/jit" not in w.filename and w.category is UserWarning]


@dataclass
class Outcome:
    """What a call gave, the warnings of ours during it, and the reports."""

    value: torch.Tensor
    warnings: list[str]
    reports: tuple[Report, ...]


def called(function: Callable[..., torch.Tensor], *args: object) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*args)
    return Outcome(value, ours_among(caught), backend.reports())
