"""Readings of masks: refusals, wrong ones that are caught, sharing, and the masks of real programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt.capture import from_dynamo
from graphopt.masks import MaskForm, arguments, classify, describe, probe
from graphopt.masks.classification import sorted_form
from graphopt.masks.term import KEY, QUERY, AtLeast, Space, all_of, at_least
from graphopt.passes.canonicalize import canonicalize
from tests.mask_reading import MIN, Mask, flags, ids, library_mask, mask_node, read, traced

# ----------------------------------------------------------------------------------------------- helpers


def reason(mask: Mask, *examples: torch.Tensor, sizes: tuple[int, int, int, int]) -> str:
    """Why a mask has no form."""
    result = classify(mask_node(traced(mask, examples)), sizes)
    assert isinstance(result, str), describe(result)
    return result


# -------------------------------------------------------------------------------------- refusals, faults


def test_refusals_say_why() -> None:
    assert "dtype torch.int64" in reason(lambda x: x, ids(2, 7), sizes=(1, 1, 2, 7))
    assert "mask rank 5 > 4" in reason(lambda x: x[None, None, None], flags(2, 7), sizes=(1, 1, 2, 7))
    assert "neither 1 nor 8" in reason(lambda x: x, flags(2, 7), sizes=(1, 1, 2, 8))
    nothing = lambda x: torch.zeros(2, 7, dtype=torch.bool)
    assert "hides every key" in reason(nothing, ids(2, 7), sizes=(1, 1, 2, 7))


def test_too_large_to_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_STATIC", 48)
    said = reason(lambda x: torch.ones(7, 7, dtype=torch.bool).tril(), ids(2, 7), sizes=(1, 1, 7, 7))
    assert said == "mask of 49 elements > 48: too large to probe"


FAULTS: dict[str, Callable[[MaskForm], MaskForm]] = {
    "offset": lambda form: replace(form, offset=1),
    "not causal": lambda form: replace(form, causal=False),
    "window": lambda form: replace(form, window=4),
    "no window": lambda form: replace(form, window=None),
    "no padding": lambda form: replace(form, key_padding=None),
    "padding for all": lambda form: replace(form, key_padding=AtLeast(KEY - 1)),
    "rest": lambda form: replace(form, rest=AtLeast(QUERY - 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("symbolic", [False, True])
def test_a_wrong_form_is_caught_by_the_probe(fault: str, symbolic: bool) -> None:
    mask = lambda p: library_mask(p, p.shape[1], p.shape[1], window=3)
    form = read(mask, flags(2, 9), symbolic=symbolic)
    assert probe.disagreement(form) is None
    wrong = probe.disagreement(FAULTS[fault](form))
    assert wrong is not None and wrong.startswith("probe disagrees at (b, h, i, j) = ")


def test_a_wrong_window_is_caught_past_its_length_only() -> None:
    """At the captured size (9) a window of 4096 and none are the same: literals choose the probe's sizes."""
    form = read(lambda p: library_mask(p, p.shape[1], p.shape[1], window=4096), flags(2, 9), symbolic=True)
    for wrong in (None, 4095, 4097):
        assert "probe disagrees" in (probe.disagreement(replace(form, window=wrong)) or "")


def test_a_wrong_fill_is_caught() -> None:
    form = read(lambda p: torch.where(library_mask(p, 7, 7), 0.0, MIN), ids(2, 7))
    assert "probe disagrees" in (probe.disagreement(replace(form, additive_fill=None)) or "")


def test_a_wrong_sort_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole road: a sorter that reads `j <= i` as `j <= i + 1` yields a reason, not a form."""
    monkeypatch.setattr(
        "graphopt.masks.classification.sorted_form",
        lambda keep, empty, space: replace(sorted_form(keep, empty, space), offset=1),
    )
    said = reason(lambda x: torch.ones(7, 7, dtype=torch.bool).tril(), ids(2, 7), sizes=(1, 1, 7, 7))
    assert said == "probe disagrees at (b, h, i, j) = (0, 0, 0, 1)"


# ----------------------------------------------------------------------------------------------- sharing


def test_layers_that_share_a_mask_share_its_reading_and_its_tensors() -> None:
    gm = traced(lambda p: p[:, None, None, 1:8] & torch.ones(7, 7, dtype=torch.bool).tril(), [flags(2, 9)])
    known: dict = {}
    made: dict = {}
    first = classify(mask_node(gm), (2, 3, 7, 7), known)
    again = classify(mask_node(gm), (2, 3, 7, 7), known)
    assert first is again and isinstance(first, MaskForm)
    assert arguments(first, made) is arguments(first, made)


def test_terms_are_decided_by_the_sizes() -> None:
    keys = sympy.Symbol("k", integer=True, positive=True)
    space = Space((sympy.Integer(2), sympy.Integer(1), sympy.Integer(5), keys))
    assert at_least(QUERY, space) == all_of()
    assert at_least(space.sizes[3] - 1 - KEY, space) == all_of()
    assert at_least(QUERY - 5, space) != at_least(QUERY - 4, space)


# ----------------------------------------------------------------------------------------- real programs


def forms_in(gm: fx.GraphModule, known: dict, made: dict) -> list[str]:
    """The forms of the masks of a captured program, one a layer; their tensors are made in the graph."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    found = []
    for node in list(gm.graph.nodes):
        mask = None
        if g.is_call(node, sdpa):
            mask, sizes = g.arg(node, "attn_mask"), (*g.shape(node.args[0])[:-1], g.shape(node.args[1])[-2])
        elif g.is_call(node, torch.ops.aten.softmax.int):
            scores = node.args[0]
            while not g.is_call(scores, torch.ops.aten.add.Tensor):
                scores = scores.args[0]
            mask, sizes = scores.args[1], g.shape(node)
        if mask is None:
            continue
        form = classify(mask, sizes, known)
        assert isinstance(form, MaskForm), form
        arguments(form, made)
        found.append(describe(form))
    gm.graph.lint()
    return found


def kinds(text: str) -> str:
    """A description without names: `causal(offset) & window(4) & padding`."""
    text = re.sub(r"causal\(offset=[^&]*\)(?= &|$| \()", "causal(offset)", text)
    text = re.sub(r"(not )?\w+[\[(]b, j[^&]*?[\])]( == 0)?(?= &|$| \()", "padding", text)
    return text.replace(f" (hidden: {MIN})", " (mean)")


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("kind", "cache", "expected"),
    [
        ("LlamaConfig", "none", [["causal & padding"]]),
        ("LlamaConfig", "static", [["causal & padding"], ["causal(offset) & padding"]]),
        ("MistralConfig", "none", [["causal & window(4) & padding"]]),
        ("Gemma2Config", "none", [["causal & window(4) & padding (mean)", "causal & padding (mean)"]]),
    ],
)
def test_masks_of_real_programs(
    kind: str, cache: str, expected: list[list[str]], dynamic: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=12,
        intermediate_size=20, vocab_size=31, max_position_embeddings=64, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    graphs: list[list[str]] = []

    def backend(gm: fx.GraphModule, examples: Sequence[object], **_: object) -> Callable[..., object]:
        captured = from_dynamo(gm, examples)
        canonicalize(captured.gm)
        known: dict = {}
        texts = forms_in(captured.gm, known, {})
        assert len(known) == len(set(texts))  # layers share
        graphs.append([kinds(t) for t in dict.fromkeys(texts)])
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    tokens, padding = torch.randint(3, 31, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    padding[0, :2] = 0
    past = transformers.StaticCache(config=config, max_cache_len=11) if cache == "static" else None
    with torch.no_grad():
        compiled(tokens, attention_mask=padding, past_key_values=past, use_cache=past is not None)
        if past is not None:
            longer = torch.cat([padding, padding[:, -1:]], 1)
            compiled(tokens[:, :1], attention_mask=longer, past_key_values=past, use_cache=True)
    if dynamic:  # how many graphs Dynamo makes, and of which steps, is its own affair
        assert {text for texts in graphs for text in texts} <= {text for texts in expected for text in texts}
        assert graphs
    else:
        assert graphs == expected
