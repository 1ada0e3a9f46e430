"""Acceptance: tiny real models, compiled under strict=True, are recognised completely and right.

Of the product dtype x fixed or dynamic shapes x cache x padding x variant, each (dtype, cache, padding) runs,
fixed and dynamic in turn; `test_the_rows_cover_all_pairs` counts. A row is a prefill and two decode steps.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import graphopt
from graphopt import defaults
from graphopt.accuracy import Verdict, judge
from graphopt.capture import Captured
from tests.models import encoder, faults, zoo
from tests.models.watch import expected_counts, recognised_counts

Row = tuple[torch.dtype, bool, zoo.Case]  # dtype, dynamic shapes, case
DTYPES = (torch.float32, torch.bfloat16)
CACHES = ("none", "dynamic", "static")
PADDINGS = ("none", "left", "right")
# Prompts without padding: several tokens for one sequence, one token for several.
SHAPES = {"none": (3, 9), "dynamic": (1, 7), "static": (3, 1)}


def _rows() -> list[Row]:
    """Every (dtype, cache, padding); the other properties alternate so that they meet each of these."""
    rows = []
    for i, (cache, padding) in enumerate(itertools.product(CACHES, PADDINGS)):
        batch, length = SHAPES[cache] if padding == "none" else (3, 7)
        for j, dtype in enumerate(DTYPES):
            window = (4, 32)[(i + i // 3 + j) % 2]
            case = zoo.Case(batch, length, padding, cache, tied=(i // 2 + j) % 2 == 0, window=window)
            rows.append((dtype, (i + j) % 2 == 1, case))
    return rows


ROWS = _rows()


def _name(row: Row) -> str:
    dtype, dynamic, case = row
    return f"{str(dtype).removeprefix('torch.')}-{'dynamic' if dynamic else 'fixed'}-{case}"


COMPILED = [
    pytest.param(name, *row, id=f"{name}-{_name(row)}")
    for name, family in zoo.FAMILIES.items()
    for row in ROWS
    if family.caches or row[2].cache == "none"
]


def compile_strictly(model: torch.nn.Module, dynamic: bool) -> torch.nn.Module:
    """The model under the backend; whatever is not recognised or fails raises."""
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend="graphopt", options={"strict": True}, dynamic=dynamic, fullgraph=True
    )
    assert isinstance(compiled, torch.nn.Module)
    return compiled


@pytest.mark.parametrize(("name", "dtype", "dynamic", "case"), COMPILED)
def test_a_compiled_model_is_recognised_and_right(
    name: str, dtype: torch.dtype, dynamic: bool, case: zoo.Case
) -> None:
    model = zoo.model(name, tied=case.tied, window=case.window, dtype=dtype)
    given = zoo.inputs(model, case)
    compiled = compile_strictly(model, dynamic)
    with torch.no_grad():
        outcome, reports = zoo.reports_of(lambda: zoo.run(compiled, given, case.cache))
    ours, eager = zoo.real(outcome, given), zoo.eager(name, case, dtype)

    verdict = judge(zoo.oracle(name, case), eager, ours, dtype)
    assert verdict.ok, verdict.reason
    if dtype == torch.float32:
        tokens = [(ours[key].argmax(-1), eager[key].argmax(-1)) for key in ours if key.startswith("logits")]
        assert all(torch.equal(a, b) for a, b in tokens)

    assert reports, "the backend was never called"
    assert not [report.fallback for report in reports if report.fallback]
    expected = expected_counts(model, **zoo.inputs(model, zoo.Case()))
    for report in reports:
        assert recognised_counts(report.counts) == expected, str(report)
    if (
        case.cache != "none" and name != "gemma2"
    ):  # a window rolls its cache, which is no update at a position
        assert reports[-1].counts["cache_update"] == 2 * expected["attention"]


def test_the_rows_cover_all_pairs() -> None:
    names = ("dtype", "dynamic", "cache", "padding", "tied", "window")
    seen = [(d, dynamic, c.cache, c.padding, c.tied, c.window) for d, dynamic, c in ROWS]
    for a, b in itertools.combinations(range(len(names)), 2):
        pairs = {(row[a], row[b]) for row in seen}
        possible = len({row[a] for row in seen}) * len({row[b] for row in seen})
        assert len(pairs) == possible, f"{names[a]} x {names[b]}: {len(pairs)} of {possible}"
    assert {c.batch for _, _, c in ROWS} == {1, 3} and {c.length for _, _, c in ROWS} == {1, 7, 9}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_explain_counts_what_an_eager_run_does(name: str) -> None:
    model, case = zoo.model(name), zoo.Case(padding="left")
    given = zoo.inputs(model, case)
    report = graphopt.explain(model, **given, use_cache=False)
    assert recognised_counts(report.counts) == expected_counts(model, **given)


# ------------------------------------------------------------------------------------------------ faults

FAULTED = zoo.Case(padding="left", tied=False, window=4)
EVERYWHERE = {"scale", "mask dropped", "padding dropped", "k and v swapped", "eps", "dropped residual"}
PLACES = {  # the faults that a family's recognised graph has a place for
    "llama": EVERYWHERE | {"mask off by one", "rope sign"},
    "qwen3": EVERYWHERE | {"mask off by one", "rope sign"},
    "gemma2": EVERYWHERE | {"mask off by one", "rope sign", "window off by one"},
    "gpt2": EVERYWHERE | {"mask off by one"},
    "bert": EVERYWHERE,
}


def recognised(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> Captured:
    """The model's graph after recognition, runnable."""
    captured = graphopt.capture(model, **given, use_cache=False)
    result, _ = defaults.pipeline(until="recognise").run(captured)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_each_fault_in_the_recognised_graph_breaks_the_rule(name: str, dtype: torch.dtype) -> None:
    model = zoo.model(name, tied=FAULTED.tied, window=FAULTED.window, dtype=dtype)
    given = zoo.inputs(model, FAULTED)
    program = recognised(model, given)
    rows = given["attention_mask"].bool()
    oracle = {"logits": zoo.oracle(name, FAULTED)["logits0"]}
    eager = {"logits": zoo.eager(name, FAULTED, dtype)["logits0"]}

    def verdict_of(gm: torch.fx.GraphModule) -> Verdict:
        with torch.no_grad():
            logits = program.replace(gm=gm)(**given, use_cache=False).logits
        return judge(oracle, eager, {"logits": logits[rows]}, dtype)

    assert verdict_of(program.gm).ok, verdict_of(program.gm).reason
    possible = [fault for fault in faults.FAULTS if fault.sites(program.gm.graph)]
    assert {fault.name for fault in possible} == PLACES[name]
    for fault in possible:
        assert not verdict_of(faults.inject(fault, program.gm)).ok, f"{fault} goes unseen"


# ------------------------------------------------------------------------------------- a real, trained model


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trained_encoder_is_recognised_and_right(dtype: torch.dtype, dynamic: bool) -> None:
    model = encoder.encoder(dtype)
    compiled = compile_strictly(model, dynamic)
    for sentences in (encoder.SENTENCES, encoder.SENTENCES[:1]):
        given = encoder.tokens_of(sentences)
        with torch.no_grad():
            ours, reports = zoo.reports_of(functools.partial(encoder.encode, compiled, given))
            eager = encoder.encode(model, given)
        verdict = judge(encoder.oracle(sentences), eager, ours, dtype)
        assert verdict.ok, verdict.reason
        assert reports or dynamic
        for report in reports:
            assert recognised_counts(report.counts) == expected_counts(model, **given), str(report)
        cosine = torch.cosine_similarity(eager["embeddings"].double(), ours["embeddings"].double())
        assert dtype != torch.float32 or cosine.min() >= 0.9999


def test_the_trained_encoder_shows_faults() -> None:
    model, given = encoder.encoder(torch.float32), encoder.tokens_of(encoder.SENTENCES)
    graph = zoo.trace(lambda **inputs: encoder.encode(model, inputs), given)
    oracle, eager = encoder.oracle(encoder.SENTENCES), graph(*given.values())
    assert judge(oracle, eager, eager, torch.float32).ok
    for fault in faults.FAULTS:
        if fault.sites(graph.graph):
            ours = faults.inject(fault, graph)(*given.values())
            assert not judge(oracle, eager, ours, torch.float32).ok, f"{fault} goes unseen"
