"""Plans: patterns fit the ends of names, words are checked."""

from __future__ import annotations

import pytest

from graphopt.errors import ShardError
from graphopt.sharding.plan import Pinned

LIBRARY = {  # as Hugging Face writes it
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.gate": "ep_router",
    "lm_head": "colwise_gather_output",
    "embed_tokens": "embedding_rowwise",
    "norm": "sequence_parallel",
}


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "column"),
        ("layers.11.self_attn.q_proj.bias", "column"),
        ("model.layers.0.self_attn.o_proj.weight", "row"),
        ("lm_head.weight", "gathered"),
        ("model.embed_tokens.weight", "vocabulary"),
        ("model.norm.weight", "auto"),
        ("model.layers.0.extra.self_attn.q_proj.weight", "auto"),  # `*` is one word
        ("model.my_lm_head.weight", "auto"),
        ("", "auto"),
    ],
)
def test_patterns_fit_the_ends_of_names(name: str, style: str) -> None:
    assert Pinned.parse(LIBRARY).style([name], "here") == style


def test_all_words_of_the_library_are_known() -> None:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    words = list(ALL_PARALLEL_STYLES)
    assert {"colwise", "rowwise", "all_reduce"}.issubset(words)
    plan = Pinned.parse({f"a{i}": word for i, word in enumerate(words)})
    styles = {word: style for word, (_, _, style) in zip(words, plan.rows, strict=True)}
    assert styles["rowwise_split_input"] == "row" and styles["replicate"] == "replicated"
    assert styles["all_reduce"] == styles["embedding_colwise"] == styles["packed_colwise"] == "auto"


def test_a_plan_may_be_pairs_and_may_be_empty() -> None:
    assert Pinned.parse([("a.b", "rowwise")]).style(["x.a.b.weight"], "") == "row"
    assert Pinned.parse(()).style(["x.weight"], "") == "auto"


def test_merged_weights_have_to_agree() -> None:
    plan = Pinned.parse({"q": "colwise", "k": "rowwise"})
    assert plan.style(["q.weight"], "attn") == "column"
    with pytest.raises(
        ShardError, match=r"attn: the plan contradicts itself: 'q' wants q\.weight column and 'k'"
    ):
        plan.style(["q.weight", "k.weight"], "attn")


def test_what_met_no_weight_is_known() -> None:
    plan = Pinned.parse({**LIBRARY, "q_prj": "colwise"})
    for name in ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.o_proj.weight", "lm_head.weight"):
        plan.style([name], "")
    assert plan.unmet() == ("embed_tokens", "q_prj")
