"""graphopt.tools.zoo.choices: how near a choice is, and inputs on which none is."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.tools.zoo.build import tiny_model
from graphopt.tools.zoo.choices import SEEDS, Margins, clear_seed
from graphopt.tools.zoo.inputs import example

SCORES = torch.tensor([[1.0, 0.0, 5.0, 0.5], [2.0, -2.0, 2.5, 9.0]])


def margin(*args: object, **kwargs: object) -> float:
    with Margins() as margins:
        torch.topk(SCORES, *args, **kwargs)  # type: ignore[call-overload]  # as topk's own
        SCORES.topk(*args, **kwargs)  # type: ignore[call-overload]  # as topk's own
    return margins.least * float(SCORES.double().std())


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (margin(1), 4.0),  # 5 and 1
        (margin(2), 0.5),  # 2.5 and 2
        (margin(k=2, largest=False), 0.5),  # 0.5 and 1
        (margin(1, dim=0), 1.0),  # 1 and 2
        (margin(4), math.inf),  # all are taken
    ],
)
def test_the_nearest_choice(call: float, expected: float) -> None:
    assert call == pytest.approx(expected) or call == expected


def test_what_a_router_masks_does_not_count() -> None:
    with Margins() as margins:
        torch.tensor([3.0, 1.0, -math.inf, -math.inf]).topk(2)
    assert margins.least == math.inf


def test_padding_does_not_count() -> None:
    scores = torch.tensor([[[2.0, 2.0, 0.0], [3.0, 1.0, 0.0]]])
    for given, expected in ((None, 0.0), (torch.tensor([[0, 1]]), 2.0)):
        with Margins(given) as margins:
            scores.topk(1)
        chosen = scores[:, 1] if given is not None else scores
        assert margins.least * float(chosen.double().std()) == pytest.approx(expected)


def test_a_model_without_choices_keeps_its_inputs() -> None:
    assert clear_seed(tiny_model("llama"), "left") == 0


def test_the_clearest_of_all_inputs_is_taken() -> None:
    model = tiny_model("mixtral")
    found = {}
    for seed in range(SEEDS):
        with torch.no_grad(), Margins() as margins:
            model(**example(model, padding="none", seed=seed))
        found[seed] = margins.least
    best = clear_seed(model, "none")
    assert found[best] == max(found.values()) > min(found.values())
    one, other = (example(model, seed=seed)["input_ids"] for seed in (0, 1))
    assert one.shape == other.shape and not torch.equal(one, other)
