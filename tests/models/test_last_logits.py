"""Logits for the last token only: the head reads one row, and everything before it is recognised as ever."""

from __future__ import annotations

import pytest
import torch

from graphopt import backend
from graphopt.accuracy import judge
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.generating import clean
from tests.models import zoo

CASE = zoo.Case(padding="left", tied=False)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_logits_of_the_last_tokens(name: str, keep: int) -> None:
    model, given = zoo.model(name, tied=False), zoo.inputs(zoo.model(name), CASE)
    more = {"use_cache": False, "logits_to_keep": keep}
    with clean(), torch.no_grad():
        eager = model(**given, **more).logits
        ours = torch.compile(model, backend="graphopt", options={"strict": True})(**given, **more).logits
        (report,) = backend.reports()
    assert ours.shape == eager.shape and ours.shape[1] == keep
    assert recognised_counts(report.counts) == expected_counts(model, **given)
    rows = zoo.oracle(name, CASE)["logits0"]
    last = given["attention_mask"].sum(-1).cumsum(0) - 1  # of each prompt, among the real tokens of all
    verdict = judge({"logits": rows[last]}, {"logits": eager[:, -1]}, {"logits": ours[:, -1]}, torch.float32)
    assert verdict.ok, verdict.reason
