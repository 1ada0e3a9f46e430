"""Acceptance: tiny real models, compiled under strict=True, are recognised completely and right.

Of the product dtype x fixed or dynamic shapes x cache x padding x variant, each (dtype, cache, padding) runs,
fixed and dynamic in turn; `test_the_rows_cover_all_pairs` counts. A row is a prefill and two decode steps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import fx

import graphopt
from graphopt import defaults
from graphopt.accuracy import Verdict, judge
from graphopt.capture import Captured, from_dynamo
from graphopt.report import Report
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.models import encoder, faults, zoo
from tests.tolerances import COSINE, ROPE_ANGLES

# What may stay unmatched. transformers 5.17 makes rope's angles by an outer product; 5.23, the only later
# version tried, does not.
ANGLES = ROPE_ANGLES if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23) else 0.0

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
        assert_complete(report, expected)
    updates = [report.counts.get("cache_update", 0) for report in reports]
    assert updates == expected_updates(model, case, len(reports))


def assert_complete(report: Report, expected: dict[str, int]) -> None:
    """What an eager run counts was recognised, and no heavy work is left over."""
    assert recognised_counts(report.counts) == expected, str(report)
    assert report.counts.get("attention_scores", 0) == 0, "scores that became no attention"
    assert report.unmatched_share <= ANGLES, report.unmatched


def expected_updates(model: torch.nn.Module, case: zoo.Case, graphs: int) -> list[int]:
    """Cache updates of each compiled graph: keys and values of each layer; a dynamic cache begins empty.

    A static cache no longer than the window rolls once it is full, which is no update at a position.
    """
    layers = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    rolls = case.cache == "static" and case.length + zoo.DECODES > case.window
    kept = [kind for kind in layers if not (rolls and kind == "sliding_attention")]
    each = 0 if case.cache == "none" else 2 * len(kept)
    return [0 if i == 0 and case.cache == "dynamic" else each for i in range(graphs)]


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
    assert_complete(report, expected_counts(model, **given))


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


# The same of the encoder's raw graph, where a mask is one tensor.
RAW = {"scale", "mask dropped", "k and v swapped", "eps", "dropped residual"}


def recognised(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> Captured:
    """The model's graph after recognition, runnable."""
    captured = graphopt.capture(model, **given, use_cache=False)
    result, _ = defaults.pipeline(until="recognise").run(captured)
    return result


def judge_of(name: str, dtype: torch.dtype) -> tuple[fx.GraphModule, Callable[[fx.GraphModule], Verdict]]:
    """A family's recognised graph of one call, and what the rule says of a graph in its place."""
    model = zoo.model(name, tied=FAULTED.tied, window=FAULTED.window, dtype=dtype)
    given = zoo.inputs(model, FAULTED)
    program = recognised(model, given)
    rows = given["attention_mask"].bool()
    oracle = {"logits": zoo.oracle(name, FAULTED)["logits0"]}
    eager = {"logits": zoo.eager(name, FAULTED, dtype)["logits0"]}

    def verdict_of(gm: fx.GraphModule) -> Verdict:
        with torch.no_grad():
            logits = program.replace(gm=gm)(**given, use_cache=False).logits
        return judge(oracle, eager, {"logits": logits[rows]}, dtype)

    assert verdict_of(program.gm).ok, verdict_of(program.gm).reason
    return program.gm, verdict_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_each_fault_in_the_recognised_graph_breaks_the_rule(name: str, dtype: torch.dtype) -> None:
    gm, verdict_of = judge_of(name, dtype)
    possible = [fault for fault in faults.FAULTS if fault.sites(gm.graph)]
    assert {fault.name for fault in possible} == PLACES[name]
    for fault in possible:
        assert not verdict_of(faults.inject(fault, gm)).ok, f"{fault} goes unseen"


def test_a_fault_in_one_place_breaks_the_rule_too() -> None:
    gm, verdict_of = judge_of("gemma2", torch.float32)
    places = [(fault, i) for fault in faults.FAULTS for i in range(len(fault.sites(gm.graph)))]
    assert len(places) > 2 * len(PLACES["gemma2"])
    for fault, i in places:
        assert not verdict_of(faults.inject(fault, gm, i)).ok, f"{fault} at place {i} goes unseen"


@dataclass
class Switch:
    """A backend that runs recognised graphs; each may be exchanged while the model stays compiled."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        """As `torch.compile` calls a backend."""
        result, _ = defaults.pipeline(until="recognise").run(from_dynamo(gm, examples))
        self.graphs.append(result.gm)
        number = len(self.graphs) - 1
        return lambda *values: self.graphs[number](*values)


# The faults that show in the last graph of a run. A decode step's window needs no mask: its cache is
# no longer. Behind left padding, the slots after the last token are hidden as padding, too: a mask off by one
# shows without padding only.
CACHED = EVERYWHERE | {"rope sign", "cache position"}
COMPILED_FAULTS = {
    "decode": ("gemma2", False, zoo.Case(padding="left", cache="static"), CACHED),
    "unpadded decode": (
        "gemma2",
        False,
        zoo.Case(cache="static"),
        (CACHED - {"padding dropped"}) | {"mask off by one"},
    ),
    "dynamic shapes": ("gemma2", True, zoo.Case(padding="left"), PLACES["gemma2"]),
}


@pytest.mark.parametrize(("name", "dynamic", "case", "wanted"), COMPILED_FAULTS.values(), ids=COMPILED_FAULTS)
def test_each_fault_in_a_compiled_graph_breaks_the_rule(
    name: str, dynamic: bool, case: zoo.Case, wanted: set[str]
) -> None:
    model = zoo.model(name, tied=case.tied, window=case.window)
    given = zoo.inputs(model, case)
    oracle, eager = zoo.oracle(name, case), zoo.eager(name, case, torch.float32)
    torch.compiler.reset()
    switch = Switch()
    compiled = torch.compile(model, backend=switch, dynamic=dynamic, fullgraph=True)

    def verdict() -> Verdict:
        with torch.no_grad():
            outcome = zoo.real(zoo.run(compiled, given, case.cache), given)
        return judge(oracle, eager, outcome, torch.float32)

    assert verdict().ok, verdict().reason
    right, seen = switch.graphs[-1], set()
    for fault in faults.FAULTS:
        if fault.sites(right.graph):
            switch.graphs[-1] = faults.inject(fault, right)
            seen |= {fault.name} if not verdict().ok else set()
    assert seen == wanted


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
            assert_complete(report, expected_counts(model, **given))
        cosine = torch.cosine_similarity(eager["embeddings"].double(), ours["embeddings"].double())
        assert dtype != torch.float32 or cosine.min() >= COSINE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trained_encoder_shows_faults(dtype: torch.dtype) -> None:
    model, given = encoder.encoder(dtype), encoder.tokens_of(encoder.SENTENCES)
    graph = zoo.trace(lambda **inputs: encoder.encode(model, inputs), given)
    oracle, eager = encoder.oracle(encoder.SENTENCES), graph(*given.values())
    assert judge(oracle, eager, eager, dtype).ok
    possible = [fault for fault in faults.FAULTS if fault.sites(graph.graph)]
    assert {fault.name for fault in possible} == RAW
    for fault in possible:
        ours = faults.inject(fault, graph)(*given.values())
        assert not judge(oracle, eager, ours, dtype).ok, f"{fault} goes unseen"
