"""What looks like a pattern and is not, and what is one and does not look so: peers' bugs as tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt import graph as g
from graphopt import ops
from graphopt.defaults import RULES
from graphopt.rewrite import Refusal
from tests.rewriting import canonical, rewritten, vocabulary
from tests.rule_cases import NAMED
from tests.tensors import qkv, rand

Rewrites = Callable[..., None]
RefusalOf = Callable[..., Refusal]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain spelling."""
    return torch.softmax(q @ k.transpose(-2, -1) / 8.0, -1) @ v


def test_divided_attention_becomes_one_op(assert_rewrites: Rewrites) -> None:
    """softmax(q k^T / 8) v, at a head_dim that is not 64."""
    after = lambda q, k, v: ops.attention(q, k, v, 1 / 8.0)
    for d in (64, 80, 7, 1):
        assert_rewrites(attended, after, rules=RULES, args=qkv(d=d))


@pytest.mark.parametrize(
    "program",
    [
        lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT, 2) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v,
        lambda q, k, v: torch.log_softmax(q @ k.mT, -1) @ v,
        lambda q, k, v: v @ torch.softmax(q @ k.mT, -1),
    ],
)
def test_what_only_looks_like_attention_is_left_alone(program: Callable[..., Tensor]) -> None:
    """Another softmax axis, transposed weights: right sizes, other meaning (all sizes 4)."""
    args = tuple(rand(4, 4, 4, 4) for _ in range(3))
    after, _ = rewritten(canonical(program, *args), RULES)
    assert "attention" not in vocabulary(after)
    torch.testing.assert_close(after(*args)[0], program(*args))


@pytest.mark.parametrize(
    "keys",
    [lambda k: k.permute(0, 2, 3, 1), lambda k: k.permute(0, 3, 1, 2), lambda k: k],
    ids=("k of [b, t, h, d]", "k of [b, d, t, h]", "k that is transposed already"),
)
def test_keys_are_those_that_the_product_reads(keys: Callable[[Tensor], Tensor]) -> None:
    """However K came to be K^T, it is attention with that K, at sizes that would hide another one."""
    args = tuple(rand(4, 4, 4, 4) for _ in range(3))
    program = lambda q, k, v: torch.softmax(q @ keys(k), -1) @ v
    after, _ = rewritten(canonical(program, *args), RULES)
    assert vocabulary(after) == ["attention"]
    torch.testing.assert_close(after(*args)[0], program(*args))


def test_scores_used_twice_are_left_alone(refusal_of: RefusalOf) -> None:
    """The reason names both nodes."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = ops.attention_scores(q, k, 1.0)
        return torch.softmax(scores, -1) @ v, scores

    refusal = refusal_of("softmax_weights", model, qkv())
    assert refusal.reason == "attention_scores is also used by output"


def test_a_norm_weight_in_fp32_gives_an_fp32_result(assert_rewrites: Rewrites) -> None:
    """bf16 activations and an fp32 weight: promotion is part of the equation."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    args = rand(2, 3, 8, dtype=torch.bfloat16), rand(8)
    assert_rewrites(before, lambda x, w: ops.rms_norm(x, w, 1e-5), rules=RULES, args=args)


def test_a_norm_takes_the_casts_around_it(assert_rewrites: Rewrites) -> None:
    """Gemma's norm in bf16 is one op of bf16 tensors, not one of fp32 between two casts."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (h * (1.0 + w.float())).to(x.dtype)

    args = rand(2, 3, 8, dtype=torch.bfloat16), rand(8, dtype=torch.bfloat16)
    assert_rewrites(before, lambda x, w: ops.rms_norm(x, w, 1e-5, 1.0, False), rules=RULES, args=args)


def test_a_centred_norm_is_a_layer_norm(assert_rewrites: Rewrites) -> None:
    """The product with the weight alone is an RMS norm of the centred row: the larger pattern is taken."""

    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b

    after = lambda x, w, b: ops.layer_norm(x, w, b, 1e-5)
    assert_rewrites(before, after, rules=RULES, args=(rand(2, 3, 8), rand(8), rand(8) + 1))


def test_a_sum_that_nobody_else_reads_is_dropped() -> None:
    """The residual output of the fused norm may be dead (vLLM#50802)."""
    program = lambda x, y: ops.rms_norm(x + y, None, 1e-6)
    after, _ = rewritten(canonical(program, rand(2, 8), rand(2, 8) + 1), RULES)
    assert vocabulary(after) == ["add_rms_norm"]
    assert [n.args[1] for n in after.graph.nodes if g.op_name(n) == "getitem"] == [0]


def test_a_softcap_below_zero_is_refused(refusal_of: RefusalOf) -> None:
    """The op takes positive caps."""
    program = lambda q, k, v: torch.tanh(ops.attention_scores(q, k, 0.1)) * -50.0
    assert refusal_of("gemma_softcap", program, qkv()).reason == "the softcap -50.0 is not positive"


def test_a_boolean_mask_stays_boolean(assert_rewrites: Rewrites) -> None:
    """masked_fill with the lowest number: hidden keys, and rows of nothing else take the mean."""

    def before(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(hidden, torch.finfo(torch.float32).min)
        return torch.softmax(scores, -1) @ v

    def after(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return ops.attention(q, k, v, 1.0, bias=~hidden, empty_rows_mean=True)

    hidden = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[0, 0, 2] = True
    assert_rewrites(before, after, rules=RULES, args=(*qkv(d=8), hidden))


def test_a_constant_of_nine_digits_is_refused_in_fp64(refusal_of: RefusalOf) -> None:
    """Bloom's GELU is torch's up to 1e-9."""
    args = (rand(2, 8, dtype=torch.float64),)
    refusal = refusal_of("bloom_gelu", NAMED["bloom_gelu"].pattern, args)
    assert refusal.reason == "0.79788456 is not sqrt(2 / pi) in fp64"


@pytest.mark.parametrize("root", [0.7071067811865475, 0.7071067811865476, 1 / 2**0.5, 0.5**0.5])
def test_a_constant_may_be_rounded_either_way(root: float) -> None:
    """1 / sqrt(2) and sqrt(1 / 2) are two neighbouring floats; 0.70710678 is another number."""
    gelu = lambda root: lambda x: x * 0.5 * (1.0 + torch.erf(x * root))
    after, _ = rewritten(canonical(gelu(root), rand(2, 8)), RULES)
    assert vocabulary(after) == ["activation"]
    assert vocabulary(rewritten(canonical(gelu(0.70710678), rand(2, 8)), RULES)[0]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_coheres_rope_and_norm(dtype: torch.dtype) -> None:
    """transformers' Cohere computes both in fp32 from tables and weights in the model's dtype."""
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    args = rand(2, 4, 3, 8, dtype=dtype), rand(2, 2, 3, 8, dtype=dtype), *(rand(1, 3, 8, dtype=dtype),) * 2
    after, watch = rewritten(canonical(cohere.apply_rotary_pos_emb, *args), RULES)
    assert [m.rule for m in watch.matches] in (["paired_rope"], ["cohere_rope"]), watch.refusals
    for have, want in zip(after(*args), cohere.apply_rotary_pos_emb(*args), strict=True):
        torch.testing.assert_close(have, want)
    norm = cohere.CohereLayerNorm(8).to(dtype)
    after, watch = rewritten(canonical(lambda x, w: _norm(norm, x, w), args[0], rand(8, dtype=dtype)), RULES)
    assert vocabulary(after) == ["layer_norm"], watch.refusals


def _norm(module: torch.nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """A module on another weight."""
    found = torch.func.functional_call(module, {"weight": weight}, (x,))
    assert isinstance(found, Tensor)
    return found


def test_a_layer_norm_without_weights_is_no_rms_norm(assert_rewrites: Rewrites) -> None:
    """The centred row's RMS norm is a layer norm of the row itself."""

    def before(x: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)

    after = lambda x: ops.layer_norm(x, None, None, 1e-5)
    assert_rewrites(before, after, rules=RULES, args=(rand(2, 3, 8),))
