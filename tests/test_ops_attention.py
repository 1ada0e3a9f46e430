"""What attention computes, against loops over the keys of each row, in fp64, and against SDPA and eager."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt import ops
from tests.op_cases import DTYPES, F32, F64, swapped
from tests.tensors import rand
from tests.tolerances import close

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, **o: object) -> tuple[Tensor, Tensor]:
    """Attention row by row over lists of the keys that are seen, in fp64; (out, lse)."""
    (b, h, n, _), (_, hk, m, dv) = q.shape, v.shape
    q, k, v = q.double(), k.double(), v.double()
    out, lse = torch.zeros(b, h, n, dv, dtype=F64), torch.full((b, h, n), -math.inf, dtype=F64)
    bias, padding, sinks = o.get("bias"), o.get("key_padding"), o.get("sinks")
    full = None if bias is None else bias.expand(b, h, n, m)
    offset = o.get("offset", 0) + int(o.get("offset_tensor", 0))
    for x, y, i in itertools.product(range(b), range(h), range(n)):
        kv = y // (h // hk)
        seen = [j for j in range(m) if not o.get("causal") or j <= i + offset]
        seen = [j for j in seen if o.get("window") is None or j > i + offset - o["window"]]
        seen = [j for j in seen if padding is None or padding[x, j]]
        seen = [j for j in seen if full is None or full.dtype != torch.bool or full[x, y, i, j]]
        logits = torch.stack([q[x, y, i] @ k[x, kv, j] * scale for j in seen]) if seen else q.new_zeros(0)
        if o.get("softcap"):
            logits = o["softcap"] * torch.tanh(logits / o["softcap"])
        if full is not None and full.dtype != torch.bool:
            logits = logits + full[x, y, i, seen].double()
        total = logits.exp().sum() + (0 if sinks is None else sinks[y].double().exp())
        lse[x, y, i] = total.log()
        if seen:
            out[x, y, i] = (logits.exp() / total) @ v[x, kv, seen]
        elif o.get("empty_rows_mean") and sinks is None and m:
            out[x, y, i] = v[x, kv].mean(0)
    return out, lse


B, H, HK, Q, K, D, DV = 2, 6, 2, 5, 7, 12, 9
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, cached": {"causal": True, "offset": K - Q},
    "offset as a tensor": {"causal": True, "offset_tensor": torch.tensor([2])},
    "both offsets": {"causal": True, "offset": -3, "offset_tensor": torch.tensor(4, dtype=torch.int32)},
    "empty first rows": {"causal": True, "offset": -2},
    "empty first rows, mean": {"causal": True, "offset": -2, "empty_rows_mean": True},
    "window": {"causal": True, "offset": 2, "window": 3},
    "window of one": {"causal": True, "offset": 2, "window": 1},
    "window without causal": {"window": 2},
    "window beyond the keys": {"window": 2, "offset": 6, "empty_rows_mean": True},
    "key padding": {"key_padding": PADDING},
    "key padding and causal": {"key_padding": PADDING.bool(), "causal": True, "empty_rows_mean": True},
    "bias": {"bias": rand(B, H, Q, K)},
    "bias by head": {"bias": rand(H, 1, K), "causal": True},
    "boolean bias": {"bias": rand(1, 1, Q, K) > 0},
    "boolean bias, mean": {"bias": rand(B, 1, Q, 1) > 0, "empty_rows_mean": True},
    "softcap": {"softcap": 2.0},
    "softcap before bias": {"softcap": 1.0, "bias": rand(Q, K) * 5},
    "sinks": {"sinks": rand(H)},
    "sinks, empty rows": {"sinks": rand(H), "causal": True, "offset": -3, "empty_rows_mean": True},
    "all": {
        "causal": True,
        "offset": 1,
        "window": 4,
        "key_padding": PADDING,
        "bias": rand(H, Q, K),
        "softcap": 3.0,
        "sinks": rand(H),
    },
}


@every_dtype
@pytest.mark.parametrize("label", OPTIONS)
def test_attention(label: str, dtype: torch.dtype) -> None:
    q, k, v = (swapped(rand(B, *s, dtype=dtype)) for s in ((H, Q, D), (HK, K, D), (HK, K, DV)))
    options = OPTIONS[label]
    oracle, oracle_lse = by_hand(q, k, v, 0.4, **options)
    close(ops.attention(q, k, v, 0.4, **options), oracle, dtype)
    out, lse = ops.attention_lse(q, k, v, 0.4, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, F32)
    assert torch.equal(out, ops.attention(q, k, v, 0.4, **options))
    close(lse, oracle_lse, lse.dtype)


@every_dtype
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 3, 0, 8, 8), (2, 4, 2, 0, 3, 8, 8), (0, 2, 2, 3, 3, 4, 4)]
)
@pytest.mark.parametrize("label", ["plain", "causal", "empty first rows, mean"])
def test_attention_of_small_and_empty_sizes(sizes: tuple[int, ...], label: str, dtype: torch.dtype) -> None:
    b, h, hk, n, m, d, dv = sizes
    q, k, v = rand(b, h, n, d, dtype=dtype), rand(b, hk, m, d, dtype=dtype), rand(b, hk, m, dv, dtype=dtype)
    oracle, oracle_lse = by_hand(q, k, v, 0.4, **OPTIONS[label])
    out, lse = ops.attention_lse(q, k, v, 0.4, **OPTIONS[label])
    close(out, oracle, dtype)
    close(lse, oracle_lse, lse.dtype)


@every_dtype
def test_attention_agrees_with_sdpa(dtype: torch.dtype) -> None:
    q, k, v = rand(3, 6, 5, 16, dtype=dtype), rand(3, 2, 5, 16, dtype=dtype), rand(3, 2, 5, 8, dtype=dtype)
    wide = [x.double() for x in (q, k, v)]
    mask = torch.arange(5) <= torch.arange(5)[:, None] + 1
    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
    close(ops.attention(q, k, v, 0.25), sdpa(*wide, enable_gqa=True), dtype)
    close(ops.attention(q, k, v, 0.25, causal=True), sdpa(*wide, is_causal=True, enable_gqa=True), dtype)
    close(ops.attention(q, k, v, 0.25, causal=True, offset=1), sdpa(*wide, mask, enable_gqa=True), dtype)


def test_mean_of_empty_rows_is_what_a_finite_mask_gives_in_eager() -> None:
    q, k, v = rand(B, H, Q, D), rand(B, H, K, D), rand(B, H, K, DV)
    padding = torch.tensor([[1] * K, [0] * K]).bool()
    mask = torch.zeros(B, 1, 1, K).masked_fill(~padding[:, None, None], torch.finfo(F32).min)
    eager = torch.softmax(q @ k.mT * 0.4 + mask, -1) @ v
    close(ops.attention(q, k, v, 0.4, key_padding=padding, empty_rows_mean=True), eager, F32)
    close(ops.attention(q, k, v, 0.4, bias=mask), eager, F32)
    zeros = ops.attention(q, k, v, 0.4, key_padding=padding)
    close(zeros[0], eager[0], F32)
    assert not zeros[1].any()


def test_parts_of_a_key_range_merge_by_lse() -> None:
    q, k, v = rand(B, H, Q, D), rand(B, HK, K, D), rand(B, HK, K, DV)
    whole, lse = ops.attention_lse(q, k, v, 0.4, causal=True)
    left, left_lse = ops.attention_lse(q, k[:, :, :3], v[:, :, :3], 0.4, causal=True)
    right, right_lse = ops.attention_lse(q, k[:, :, 3:], v[:, :, 3:], 0.4, causal=True, offset=-3)
    close(torch.logaddexp(left_lse, right_lse), lse, F32)
    close(left * (left_lse - lse).exp()[..., None] + right * (right_lse - lse).exp()[..., None], whole, F32)


def test_additive_minus_infinity_hides_a_key_and_nan_is_not_hidden() -> None:
    q, k, v = rand(1, 1, 2, 4), rand(1, 1, 3, 4), rand(1, 1, 3, 4)
    hidden = torch.full((2, 3), -math.inf)
    assert not ops.attention(q, k, v, 1.0, bias=hidden).any()
    assert ops.attention(q * math.nan, k, v, 1.0, causal=True).isnan().all()


def test_attention_copies_no_key_for_its_group() -> None:
    """8 query heads on each of 2 kv heads: no allocation is as large as eight copies of k."""
    q, k = torch.zeros(1, 16, 1, 64), torch.zeros(1, 2, 4096, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.attention(q, k, k, 1.0)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 16 * 4096 * 4 <= largest < 8 * k.nbytes  # the scores are seen, so the profiler works
