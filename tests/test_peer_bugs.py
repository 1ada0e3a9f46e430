"""Every bug of a peer that we know of, and the test that would show it here.

Most stand where the code that they test is tested; what had no test stands below. The table is checked: each
test in it exists.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt import backend
from graphopt import graph as g
from graphopt.defaults import RULES
from tests.block import agree
from tests.models import zoo
from tests.rewriting import canonical, rewritten, vocabulary
from tests.tensors import rand

TESTS = Path(__file__).parent
HERE = Path(__file__).name
LOOKALIKES, MASKS, LIVE = "test_lookalikes.py", "test_masks.py", "test_weights_live.py"
FLOW, SHAPES = "sharding/test_flow.py", "fuzz/test_shapes.py"

# The bug, with its public issue where there is one -> the tests.
BUGS: dict[str, tuple[tuple[str, str], ...]] = {
    "permuted K wrongly fused (pytorch#195320)": (
        (LOOKALIKES, "test_what_only_looks_like_attention_is_left_alone"),
    ),
    "only head_dim 64 matched (kernl)": ((LOOKALIKES, "test_divided_attention_becomes_one_op"),),
    "padding mask taken for causal (AutoDeploy, kernl, DeepSpeed#3960)": (
        (MASKS, "test_padding_alone"),
        (MASKS, "test_padding_with_causal"),
    ),
    "softcap attention not matched, silently (AutoDeploy#4789)": ((HERE, "test_softcapped_attention"),),
    "fp32 norm weight with bf16 activations (vLLM#48324)": (
        (LOOKALIKES, "test_a_norm_weight_in_fp32_gives_an_fp32_result"),
    ),
    "Gemma's 1 + w (vLLM#48324)": ((LOOKALIKES, "test_a_norm_takes_the_casts_around_it"),),
    "dead residual output (vLLM#50802)": ((LOOKALIKES, "test_a_sum_that_nobody_else_reads_is_dropped"),),
    "one more None argument (vLLM#41767)": ((HERE, "test_defaults_that_are_given"),),
    "boolean mask (ONNX Runtime#16453)": ((LOOKALIKES, "test_a_boolean_mask_stays_boolean"),),
    "an argument named out (pytorch#137229)": (
        ("test_semantics.py", "test_a_module_with_an_argument_named_out"),
    ),
    "scalars under dynamic=True": (
        ("test_match.py", "test_scalars_may_be_graph_values"),
        ("test_rules.py", "test_fires_with_symbols"),
    ),
    "sym_size nodes (pytorch#111190)": (("passes/test_speller.py", "test_a_symbolic_size_has_one_node"),),
    "tied embeddings under tensor parallelism (AutoDeploy#11353)": (
        ("passes/test_shard.py", "test_ranks_together_give_the_logits_of_one"),
        (FLOW, "test_a_tied_vocabulary_is_one_slice"),
    ),
    "vocabulary not divisible by the ranks (transformers#37051)": (
        ("passes/test_shard.py", "test_ranks_together_give_the_logits_of_one"),  # of 97 to 109 words
    ),
    "more ranks than kv heads (DeepSpeed#7259)": (
        ("sharding/test_heads.py", "test_few_kv_heads_are_copied_to_the_ranks_that_read_them"),
    ),
    "shared expert and routed sum need one all-reduce": (
        (FLOW, "test_a_shared_expert_and_the_routed_sum_need_one_reduction"),
    ),
    "non-contiguous chunk into a norm kernel": ((HERE, "test_a_chunk_goes_into_a_norm"),),
    "narrow and broadcast inputs": ((SHAPES, "test_any_size_and_layout_is_right"),),
    "weight updated in place after compile": (
        (LIVE, "test_a_change_shows_in_the_next_call_without_a_compile"),
    ),
    "dynamic, static and no cache": (
        ("models/test_models.py", "test_a_compiled_model_is_recognised_and_right"),
    ),
    "graph break inside a layer (DeepSpeed#7942)": (
        (LIVE, "test_layers_compiled_one_by_one_share_their_graphs"),
    ),
    "more than 64 arguments": (("test_dynamo_graphs.py", "test_more_than_64_arguments"),),
    "1-token prompt, second call differs (DeepSpeed#2644)": (
        (HERE, "test_a_prompt_of_one_token_twice"),
        ("test_clients.py", "test_three_calls_of_generate_are_one_compile"),
    ),
    "injection that matched nothing and said nothing (DeepSpeed#4840)": (
        ("test_fallbacks.py", "test_a_recogniser_that_matches_nothing_warns"),
    ),
    "unknown packed QKV treated as another model's (DeepSpeed)": ((HERE, "test_packed_projections"),),
    "no query and one query": ((SHAPES, "test_any_size_and_layout_is_right"),),
    "two models interleaved": ((LIVE, "test_two_models_interleaved_with_changes"),),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_bug_has_a_test(bug: str) -> None:
    assert BUGS[bug]
    for file, name in BUGS[bug]:
        functions = [n for n in ast.parse((TESTS / file).read_text()).body if isinstance(n, ast.FunctionDef)]
        assert name in [f.name for f in functions], f"tests/{file} has no {name}"


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_softcapped_attention(width: int, masked: bool) -> None:
    """cap * tanh(scores / cap) is an argument of the attention, mask or none (AutoDeploy#4789)."""

    def program(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(2, 3) * width**-0.5 / 20.0) * 20.0
        return torch.softmax(scores + bias if masked else scores, -1) @ v

    args = (*(rand(2, 4, n, width) for n in (5, 6, 6)), rand(2, 1, 5, 6))
    after, watch = rewritten(canonical(program, *args), RULES)
    (node,) = [n for n in after.graph.nodes if g.op_name(n) == "attention"]
    assert vocabulary(after) == ["attention"] and g.arg(node, "softcap") == 20.0, watch.refusals
    torch.testing.assert_close(after(*args)[0], program(*args))


GIVEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q),
        lambda q: F.scaled_dot_product_attention(q, q, q, None, 0.0, False, scale=None, enable_gqa=False),
    ),
    "layer_norm": (
        lambda q: F.layer_norm(q, (8,)),
        lambda q: torch.layer_norm(q, (8,), None, bias=None, eps=1e-5, cudnn_enable=True),
    ),
    "linear": (lambda q: F.linear(q, q[0, 0]), lambda q: F.linear(q, q[0, 0], bias=None)),
    "activation": (lambda q: F.gelu(q), lambda q: F.gelu(q, approximate="none")),
    "softmax": (
        lambda q: torch.softmax(q @ q.mT, -1) @ q,
        lambda q: F.softmax(q @ q.mT, dim=-1, dtype=None) @ q,
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_defaults_that_are_given(name: str) -> None:
    """An argument that says what is so anyway changes nothing (vLLM#41767)."""
    plain, wordy = (rewritten(canonical(f, rand(2, 3, 5, 8)), RULES)[0] for f in GIVEN[name])
    assert vocabulary(plain) and g.fingerprint(plain.graph) == g.fingerprint(wordy.graph)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_chunk_goes_into_a_norm(fresh: None, kind: str, part: int) -> None:
    """Half of a row: its stride is the whole row's."""

    def program(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        half = x.chunk(2, -1)[part]
        half = half + y.chunk(2, -1)[1 - part] if y.dim() > 1 else half
        return F.rms_norm(half, (12,), w, 1e-2) if kind == "rms" else F.layer_norm(half, (12,), w, None, 1e-2)

    compiled = torch.compile(program, backend="graphopt", options={"strict": True})
    for y in (rand(3, 5, 24), rand(24)):
        args = rand(3, 5, 24), y, rand(12)
        agree(compiled(*args), program(*args))
    assert all(sum(r.counts.get(f"{a}{kind}_norm", 0) for a in ("", "add_")) for r in backend.reports())


def test_a_prompt_of_one_token_twice(fresh: None) -> None:
    """A static cache that starts with one token, filled twice: nothing of the first run is left in it."""
    model = zoo.model("llama")
    compiled = torch.compile(model, backend="graphopt", options={"strict": True})
    case = zoo.Case(batch=1, length=1, cache="static")
    given = zoo.inputs(model, case)
    eager = zoo.run(model, given, case.cache)
    for _ in range(2):
        for want, have in zip(eager, zoo.run(compiled, given, case.cache), strict=True):
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (want, have)), strict=True):
                agree(b, a)


class Packed(nn.Module):
    """Attention whose Q, K and V are one projection, in one of the orders that models have."""

    ORDERS = ("3 heads width", "heads 3 width", "width 3 heads", "groups q k v", "chunks")

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        with torch.random.fork_rng():
            torch.manual_seed(3)
            features = 8 * (4 + 2 + 2) if order == "groups q k v" else 8 * 4 * 3
            self.project = nn.Linear(20, features).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, length, 20] -> [batch, length, 32]: 4 heads of 8"""
        packed, order = self.project(x), self.order
        batch, length, _ = packed.shape
        if order == "3 heads width":
            q, k, v = packed.view(batch, length, 3, 4, 8).unbind(2)
        elif order == "heads 3 width":
            q, k, v = packed.view(batch, length, 4, 3, 8).unbind(3)
        elif order == "width 3 heads":
            q, k, v = (t.mT for t in packed.view(batch, length, 8, 3, 4).unbind(3))
        elif order == "groups q k v":  # 2 groups of 2 query heads, a key and a value
            q, k, v = packed.view(batch, length, 2, 4, 8).split([2, 1, 1], 3)
            q, k, v = (t.reshape(batch, length, -1, 8) for t in (q, k, v))
        else:
            q, k, v = (t.view(batch, length, 4, 8) for t in packed.chunk(3, -1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=order == "groups q k v")
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("order", Packed.ORDERS)
def test_packed_projections(fresh: None, order: str) -> None:
    """Each order is read off the graph: attention is recognised, and its heads are the right ones."""
    model, x = Packed(order), rand(2, 5, 20)
    agree(torch.compile(model, backend="graphopt", options={"strict": True})(x), model(x))
    assert backend.reports()[0].counts["attention"] == 1
