"""Caches of every kind: prompts given whole, in chunks or a token at a time give the same logits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from graphopt import backend
from graphopt.accuracy import judge
from graphopt.report import Report
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.block import counted
from tests.models import caching, zoo
from tests.tolerances import LOGITS

# Each ends in one decode step at least, each crosses the windows (of 4) and has a chunk behind other tokens.
CHUNKS = (3, 4, 1, 1)
FIRST_ALONE = (1, 5, 2, 1)  # a prompt of one token
RUNS = {
    "llama dynamic": ("llama", "dynamic", FIRST_ALONE),
    "llama static": ("llama", "static", CHUNKS),
    "mistral dynamic": ("mistral", "dynamic", CHUNKS),
    "mistral bare": ("mistral", "bare", FIRST_ALONE),
    "mistral static": ("mistral", "static", FIRST_ALONE),
    "gemma3 dynamic": ("gemma3", "dynamic", FIRST_ALONE),
    "gemma3 static": ("gemma3", "static", CHUNKS),
    "t5 dynamic": ("t5", "dynamic", FIRST_ALONE),
    "t5 static": ("t5", "static", CHUNKS),
    "bart dynamic": ("bart", "dynamic", CHUNKS),
    "bart static": ("bart", "static", FIRST_ALONE),
}

pytestmark = pytest.mark.usefixtures("emptied")


def strictly(model: nn.Module, **how: object) -> nn.Module:
    """The model under the backend."""
    compiled = torch.compile(model, backend="graphopt", options={"strict": True}, fullgraph=True, **how)
    assert isinstance(compiled, nn.Module)
    return compiled


@pytest.mark.parametrize(("name", "kind", "parts"), RUNS.values(), ids=RUNS)
def test_parts_of_a_prompt_give_what_the_whole_gives(name: str, kind: str, parts: Sequence[int]) -> None:
    model = caching.model(name)
    given, ours = caching.inputs(model), strictly(model)

    def fed(call: nn.Module) -> torch.Tensor:
        return caching.feed(call, model, parts, caching.cache(model, kind), given)

    with torch.no_grad():
        eager = caching.real(model, fed(model))
        logits, reports = zoo.reports_of(lambda: fed(ours))
        again, more = zoo.reports_of(lambda: fed(ours))
    verdict = judge({"logits": caching.oracle(name)}, {"logits": eager},
                    {"logits": caching.real(model, logits)}, torch.float32)  # fmt: skip
    assert verdict.ok, verdict.reason
    assert torch.equal(caching.real(model, again), caching.real(model, logits))
    assert not more, "a second prompt with a new cache of the same kind compiles nothing"

    assert 2 <= len(reports) <= len(parts), "each call of another shape, and no more"
    assert not [r.fallback for r in reports if r.fallback]
    whole, later = eager_counts(name)
    assert recognised_counts(reports[0].counts) == whole
    for report in reports[1:]:
        assert recognised_counts(report.counts) == later
    assert all(r.unmatched_share == 0 for r in reports)
    check_updates(name, kind, reports)


def eager_counts(name: str) -> tuple[dict[str, int], dict[str, int]]:
    """What an eager run of a decoder has: in its first call, and where cross attention's keys are re-used.

    Attention across makes keys and values of the source once: a linear for each, in each of 2 layers.
    """
    model = caching.model(name)
    given = caching.inputs(model)
    past = caching.cache(model, "dynamic")
    if not model.config.is_encoder_decoder:
        counts = expected_counts(model, input_ids=given["ids"], attention_mask=given["mask"])
        return counts, counts
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=given["source"], attention_mask=given["mask"])
    rest = {"encoder_outputs": encoded, "attention_mask": given["mask"], "past_key_values": past}
    first = expected_counts(model, decoder_input_ids=given["ids"][:, :4], **rest)
    later = expected_counts(model, decoder_input_ids=given["ids"][:, 4:], **rest)
    assert first["linear"] - later["linear"] == 4 and first["attention"] == later["attention"]
    return first, later


def check_updates(name: str, kind: str, reports: Sequence[Report]) -> None:
    """Updates: keys and values of 2 layers; a dynamic cache begins empty; a full window rolls instead."""
    updates = [r.counts.get("cache_update", 0) for r in reports]
    windows = {"mistral": 2, "gemma3": 1}.get(name, 0) if kind == "static" else 0
    if kind != "static":
        assert updates[0] == 0 and set(updates[1:]) == {4}
    elif caching.KINDS[name].pair:
        assert updates[0] == 8 and set(updates[1:]) == {4}, "across, once"
    else:
        assert updates[0] == 4 and updates[-1] == 4 - 2 * windows


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_errors_in_these_models_would_show(name: str) -> None:
    model = caching.model(name)
    given = caching.inputs(model)
    stds, out = zoo.measure(model, {"input_ids": given["ids"], "attention_mask": given["mask"]})
    assert all(0.7 < std < 3 for std in stds) and 0.3 < out < 3


# ---------------------------------------------------------------------------------------------- interleaved


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_two_models_by_turns(kind: str) -> None:
    models = [caching.build("llama", seed) for seed in (1, 2)]
    given = caching.inputs(models[0])
    ours = [strictly(m) for m in models]
    pasts = [caching.cache(m, kind) for m in models]
    theirs = [caching.cache(m, kind) for m in models]
    turns = [(i, start, stop) for start, stop in ((0, 7), (7, 8), (8, 9)) for i in (0, 1)]
    agreed = []
    with torch.no_grad(), counted() as counts:
        for i, start, stop in turns:
            now = {"input_ids": given["ids"][:, start:stop], "attention_mask": given["mask"][:, :stop]}
            logits = ours[i](**now, past_key_values=pasts[i]).logits
            eager = models[i](**now, past_key_values=theirs[i]).logits
            agreed.append(torch.equal(logits.argmax(-1), eager.argmax(-1)))
            assert (logits - eager)[given["mask"][:, start:stop].bool()].abs().max() < LOGITS * eager.std()
    assert all(agreed)
    # Both run the same graphs, each with its own weights: Q, K, V and gate, up of 2 layers.
    assert counts["graphs"] <= 3 and counts["prepared"] == 2 * 4
    assert not [r.fallback for r in backend.reports() if r.fallback]


# ---------------------------------------------------------------------------------------------------- empty


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_part_of_no_tokens_changes_nothing(kind: str) -> None:
    model = caching.model("falcon")
    given, ours, past = caching.inputs(model), strictly(model), caching.cache(model, kind)
    parts = (7, 0, 2)
    with torch.no_grad():
        eager = caching.real(model, caching.feed(model, model, parts, caching.cache(model, kind), given))
        logits, reports = zoo.reports_of(lambda: caching.feed(ours, model, parts, past, given))
    verdict = judge({"logits": caching.oracle("falcon")}, {"logits": eager},
                    {"logits": caching.real(model, logits)}, torch.float32)  # fmt: skip
    assert verdict.ok, verdict.reason
    assert len(reports) == 3 and all(r.counts["attention"] == 2 and not r.fallback for r in reports)


def test_a_model_that_takes_no_empty_prompt_says_so_itself() -> None:
    model = caching.model("llama")
    empty = caching.inputs(model)["ids"][:, :0]
    ours = torch.compile(model, backend="graphopt", options={"strict": True})
    for call in (model, ours):
        with torch.no_grad(), pytest.raises(RuntimeError, match="reshape"):
            call(input_ids=empty, past_key_values=caching.cache(model, "dynamic"))
