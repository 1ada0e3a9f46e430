"""Wrong rules and wrong kernels for tests of verification, and a compiled program with what it told."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt import backend, defaults, ops
from graphopt.kernel import Kernel
from graphopt.report import Report
from graphopt.rule import Rule
from graphopt.translate import Translation
from graphopt.verification import Verification

AnyRule = Rule | Translation


def wrong_rule(name: str, **changes: object) -> tuple[AnyRule, ...]:
    """The default rules, the one of that name with other fields; its place is the same."""
    assert any(r.name == name for r in defaults.RULES)
    return tuple(dataclasses.replace(r, **changes) if r.name == name else r for r in defaults.RULES)  # type: ignore[arg-type]


def wrong_translation(
    name: str, change: Callable[[Mapping[str, object]], Mapping[str, object]]
) -> tuple[AnyRule, ...]:
    """The default rules, one translation with other arguments."""
    right = next(r for r in defaults.RULES if r.name == name)
    assert isinstance(right, Translation)

    def arguments(node: fx.Node) -> Mapping[str, object] | str:
        given = right.arguments(node)
        return given if isinstance(given, str) else {**given, **change(given)}

    return wrong_rule(name, arguments=arguments)


def more_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A norm with an eps that is not the model's."""
    return ops.rms_norm(x, weight, 0.1)


def late_sdpa(*args: object) -> object:
    """attention on values moved by one key."""
    q, k, v, *rest = args
    assert isinstance(v, Tensor)
    launch = next(kernel.launch for kernel in defaults.KERNELS if kernel.name == "attention_sdpa")
    return launch(q, k, v.roll(1, 2), *rest)


def wrong_kernel(name: str, launch: Callable[..., object]) -> tuple[Kernel, ...]:
    """The default kernels, one with another launcher."""
    assert any(k.name == name for k in defaults.KERNELS)
    return tuple(dataclasses.replace(k, launch=launch) if k.name == name else k for k in defaults.KERNELS)


@dataclass
class Ran:
    """What calls gave, what they warned of, and the report of the last graph."""

    results: list[object]
    warnings: list[str]
    report: Report

    @property
    def found(self) -> Verification:
        """The report's account of verification."""
        assert self.report.verification is not None
        return self.report.verification

    @property
    def culprits(self) -> set[str]:
        """The rules and kernels that were taken back."""
        return {t.rule for t in self.found.taken_back}


def ran(
    call: Callable[..., object], *calls: Callable[[Callable[..., object]], object], **options: object
) -> Ran:
    """Compile a model or function with these options and make some calls of it."""
    compiled = torch.compile(call, backend="graphopt", options={"verify": "first", **options})
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        results = [one(compiled) for one in calls]
    said = [str(w.message) for w in caught if str(w.message).startswith("graphopt")]
    return Ran(results, said, backend.reports()[-1])
