"""Random programs keep eager's numbers: recorded seeds of each kind here, others by `make fuzz`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from graphopt import defaults, ops
from graphopt.rule import Float, T, rule
from tests.fuzz.run import KINDS, failure, main, search
from tests.fuzz.script import NoProgram

# Seeds that are run, and what at least a sixth of the programs has to become: else they test little.
RECORDED = {
    "spelled_attention": (40, "attention"),
    "fused_attention": (24, "attention"),
    "block": (40, "linear"),
    "norm_of_norm": (40, "rms_norm"),
    "siblings": (30, "linear"),
    "written_cache": (24, "cache_update"),
    "operators": (60, "activation"),  # nnsmith's GELU and ReLU
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of torch, about variances of one element and the like
def test_recorded_seeds_are_right(kind: str) -> None:
    seeds, expected = RECORDED[kind]
    run, recognised, wrong = 0, Counter[str](), []
    for seed in range(seeds):
        try:
            bad, counts = failure(kind, seed)
        except NoProgram:
            continue
        run += 1
        recognised.update(set(counts))
        wrong += [bad] if bad else []
    assert not wrong, "\n\n".join(wrong)
    assert run >= seeds / 2, f"only {run} of {seeds} seeds are programs"
    assert recognised[expected] >= run / 6, f"{expected} in {recognised[expected]} of {run}"


# ------------------------------------------------------------------------------ that mistakes are found


def absolute_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root of its mean of absolutes"""
    return weight * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + eps))


def rounded_erf_gelu(x: Tensor) -> Tensor:
    """x * 0.5 * (1 + erf(x / 1.4142))"""
    return x * 0.5 * (1.0 + torch.erf(x / 1.4142))


# Rules that are false, with a program that has to show it: its kind and its seed.
FALSE_RULES = {
    ("norm_of_norm", 64): rule(
        absolute_rms_norm,
        lambda x, weight, eps: ops.rms_norm(x, weight, eps),
        x=T("... n"),
        weight=T("n", "W"),
        eps=Float(1e-5),
    ),
    ("block", 2): rule(rounded_erf_gelu, lambda x: ops.activation(x, "gelu"), x=T("... n")),
}


@pytest.mark.parametrize(("kind", "seed"), FALSE_RULES)
@pytest.mark.filterwarnings("ignore")
def test_a_false_rule_is_found(monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    """The failure says how to see it again; without the rule the program is right."""
    assert failure(kind, seed)[0] is None
    monkeypatch.setattr(defaults, "RULES", (*defaults.RULES, FALSE_RULES[kind, seed]))
    wrong, _ = failure(kind, seed)
    assert wrong is not None and wrong.startswith("Wrong: recognised output 0")
    assert wrong.endswith(f"again: python -m tests.fuzz.run {kind} {seed}")


def test_the_search_says_what_it_ran() -> None:
    lines: list[str] = []
    assert search(2.0, 0, ("fused_attention",), lines.append) == 0
    (line,) = lines
    assert "programs, seeds 0 to " in line and "0 wrong" in line and "attention in" in line


def test_one_program_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fused_attention", "0"]) == 0
    assert "right; it became" in capsys.readouterr().out
