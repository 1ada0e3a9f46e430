"""A fixed sample of the zoo: each type builds, has the golden counts, is right, and has lost no match.

All types run by `make zoo`. A type is a minute of an idle machine at most; these take about 3 s each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphopt import backend
from graphopt.tools.zoo.build import kinds, tiny_model
from graphopt.tools.zoo.census import watching
from graphopt.tools.zoo.inputs import example
from graphopt.tools.zoo.row import TOKENS
from graphopt.tools.zoo.run import WRITERS, examine
from graphopt.tools.zoo.table import lost, miscounted, read, totals
from tests.tolerances import close

GOLDEN: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "golden_zoo.json").read_text())
BASELINE = read(Path(__file__).parents[2] / "bench" / "results" / "zoo.json")

# Diverse and cheap. Each with the dtype and padding of one run: the whole product is for `make zoo`.
SAMPLE = {
    "mistral": ("float32", "left"),  # a window
    "mixtral": ("bfloat16", "left"),  # routed experts
    "gemma3": ("float32", "none"),  # local and global layers, norms of 1 + w
    "phi": ("bfloat16", "left"),  # attention and MLP in parallel, partial rope
    "gptj": ("float32", "left"),  # interleaved rope
    "bloom": ("float32", "left"),  # ALiBi
    "falcon": ("bfloat16", "none"),  # one packed projection
    "gpt_oss": ("bfloat16", "none"),  # sinks
    "deepseek_v3": ("float32", "left"),  # latent attention
    "t5": ("float32", "left"),  # relative position bias, cross attention
    "roberta": ("bfloat16", "left"),
    "deberta-v2": ("float32", "left"),  # disentangled positions
    "vit": ("float32", "none"),
    "whisper": ("float32", "none"),
}


# What people ask for; each has to be there, in both dtypes, padded where it takes a mask.
NAMED = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi",
    "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "gpt_oss", "opt", "bloom",
    "falcon", "mpt", "stablelm", "starcoder2", "olmo2", "cohere", "granite", "glm4", "smollm3",
    "deepseek_v3", "t5", "bart", "whisper", "bert", "roberta", "distilbert", "electra", "albert",
    "deberta-v2", "modernbert", "mpnet", "vit", "clip", "dinov2", "siglip", "wav2vec2", "mamba",
]  # fmt: skip


def test_the_measured_zoo_is_what_is_promised() -> None:
    """`make zoo` wrote it: 160 language models at least, all right, 95% of what is there recognised."""
    rows = {row.type: row for row in BASELINE}
    built = [row for row in BASELINE if row.broken is None]
    assert sum(row.group in ("causal LM", "masked LM") for row in built) >= 160
    assert all(row.right for row in built), [row.type for row in built if not row.right]
    found = totals(BASELINE).kinds
    for what in ("norm", "attention", "mlp"):
        recognised, there = found[what]
        assert recognised >= 0.95 * there, what
    for name in NAMED:
        row = rows[name]
        assert row.right and not any(run.handed_back for run in row.every().values()), name
        assert {"float32 none", "bfloat16 none"} <= set(" / ".join(row.runs).split(" / ")), name
        assert not row.missing(), name
    for row in built:  # what is missing is told, with what came nearest
        assert row.near() or not row.missing(), row.type


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", SAMPLE)
def test_a_type_is_right_and_has_lost_nothing(name: str) -> None:
    dtype, padding = SAMPLE[name]
    row = examine(name, [getattr(torch, dtype)], [padding])
    assert row.broken is None, row.broken
    assert name in GOLDEN and not miscounted([row], GOLDEN)
    assert row.right, row.runs
    assert list(row.runs) == [f"{dtype} {padding}"] and row.undecoded is None
    assert (row.decoded is not None) == (dtype == "float32" and row.group in WRITERS)
    assert row.decoded is None or row.decoded.tokens == TOKENS * 3
    assert any(before.type == name for before in BASELINE)
    assert not lost([row], BASELINE)


# Each with what made the whole graph refused once.
ONCE_REFUSED = {
    "mamba": "float32",  # vmap, of a scan
    "jamba": "bfloat16",
    "deepseek_v2": "bfloat16",  # a rope of complex numbers
    "llama4_text": "float32",
}


@pytest.mark.parametrize("name", ONCE_REFUSED)
def test_no_graph_is_refused(name: str) -> None:
    row = examine(name, [getattr(torch, ONCE_REFUSED[name])], ["none"])
    assert row.broken is None and row.right, (row.broken, row.runs)
    for run in row.runs.values():
        assert run.judged == run.graphs and not run.refused
    for what in ("norm", "attention", "mlp", "rope", "experts"):
        assert row.found(what) == row.there.get(what, 0), what


def test_a_loop_over_hit_experts_is_right_and_says_why_it_is_broken() -> None:
    """transformers' eager experts read on the host which were chosen: Dynamo ends the graph there."""
    model, seen = tiny_model("mixtral").eval(), len(backend.reports())
    model.set_experts_implementation("eager")  # type: ignore[operator]  # of transformers
    given = example(model, padding="left")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        compiled = torch.compile(model, backend="graphopt", options={"strict": True})
        close(compiled(**given).logits[real], model(**given).logits[real], torch.float32)
    reports = backend.reports()[seen:]
    assert sum(r.counts.get("experts", 0) for r in reports) == 0
    ends = [r.ends for r in reports if r.ends is not None]
    assert ends and all("nonzero" in text and "modeling_mixtral.py:" in text for text in ends)
    assert all(r.ends in str(r) for r in reports if r.ends is not None)


def test_the_sample_sees_both_dtypes_and_paddings() -> None:
    assert set(SAMPLE.values()) >= {("float32", "none"), ("float32", "left"), ("bfloat16", "left")}
    assert len({kinds()[name].group for name in SAMPLE}) == 5


@pytest.mark.parametrize("name", ["gptj", "bert", "t5"])
def test_weights_let_errors_show(name: str) -> None:
    model = tiny_model(name)
    with torch.no_grad(), watching(model) as seen:
        logits = model(**example(model)).logits
    assert all(1 <= float(x.std()) <= 3 for x in seen.logits) and seen.logits
    assert 0.5 <= float(logits.std()) <= 2
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
