"""What every op but attention computes, against formulas written another way in fp64 and models' own code."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt import ops
from tests.op_cases import BF16, DTYPES, F16, F32, F64, fused, swapped
from tests.tensors import rand
from tests.tolerances import LARGE_MEAN, close

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(2, 4, 64), (7, 123), (1, 1, 1), (0, 5), (3, 0)]


# ------------------------------------------------------------------------------------------------------ norms


def llama_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LlamaRMSNorm.forward, in fp32 or wider."""
    h = x.to(torch.promote_types(x.dtype, F32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def gemma_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """GemmaRMSNorm.forward, in fp32 or wider."""
    h = x.to(torch.promote_types(x.dtype, F32))
    out = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (out * (1.0 + weight.to(h.dtype))).type_as(x)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w = rand(*shape, dtype=dtype) * 3, rand(shape[-1], dtype=dtype)
    oracle = F.rms_norm(x.double(), shape[-1:], w.double(), 1e-3)
    close(ops.rms_norm(x, w, 1e-3), oracle, dtype)
    close(ops.rms_norm(x, None, 1e-3), F.rms_norm(x.double(), shape[-1:], None, 1e-3), dtype)
    close(
        ops.rms_norm(x, w - 1, 1e-3, 1.0),
        F.rms_norm(x.double(), shape[-1:], (w - 1).double() + 1, 1e-3),
        dtype,
    )
    assert torch.equal(ops.rms_norm(x, w, 1e-3), llama_rms_norm(x, w, 1e-3))
    assert torch.equal(ops.rms_norm(x, w, 1e-3, 1.0, False), gemma_rms_norm(x, w, 1e-3))


def test_rms_norm_promotes_as_models_do() -> None:
    x, w = rand(3, 8, dtype=BF16), rand(8)
    assert torch.equal(ops.rms_norm(x, w, 1e-6), llama_rms_norm(x, w, 1e-6))
    assert ops.rms_norm(x, w, 1e-6).dtype == F32 and ops.rms_norm(x, w, 1e-6, 1.0, False).dtype == BF16
    assert ops.rms_norm(x, None, 1e-6, 5.0).equal(ops.rms_norm(x, None, 1e-6))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = (
        rand(*shape, dtype=dtype) * 3 + 1,
        rand(shape[-1], dtype=dtype),
        rand(shape[-1], dtype=dtype).neg(),
    )
    for weight, bias in itertools.product((w, None), (b, None)):
        wide = [None if t is None else t.double() for t in (weight, bias)]
        close(ops.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x.double(), shape[-1:], *wide, 1e-3), dtype)
    assert ops.layer_norm(x, w.double(), None, 1e-3).dtype == dtype


def test_layer_norm_of_a_large_mean_keeps_its_digits() -> None:
    x = rand(4, 64) + 1000
    oracle = F.layer_norm(x.double(), (64,), None, None, 1e-5)
    ours = ops.layer_norm(x, None, None, 1e-5).double()
    # mean(x^2) - mean(x)^2 would miss the variance by 0.1.
    torch.testing.assert_close(ours, oracle, **LARGE_MEAN)


@every_dtype
def test_norms_of_a_sum(dtype: torch.dtype) -> None:
    x, residual, w = rand(2, 7, 12, dtype=dtype), rand(7, 12, dtype=dtype), rand(12, dtype=dtype)
    total = x + residual
    normed, added = ops.add_rms_norm(x, residual, w, 1e-6, 1.0, False)
    assert torch.equal(added, total) and torch.equal(normed, ops.rms_norm(total, w, 1e-6, 1.0, False))
    normed, added = ops.add_layer_norm(x, residual, w, None, 1e-5)
    assert torch.equal(added, total) and torch.equal(normed, ops.layer_norm(total, w, None, 1e-5))
    assert ops.add_rms_norm(x, residual.double(), None, 1e-6)[0].dtype == F64


# ------------------------------------------------------------------------------------------------------- rope


def turned(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Rope as a product of complex numbers; x [B, H, S, D], angle [B or 1, S, R / 2]."""
    r = 2 * angle.shape[-1]
    h = x[..., :r].double()
    first, second = (h[..., ::2], h[..., 1::2]) if interleaved else (h[..., : r // 2], h[..., r // 2 :])
    z = torch.complex(first, second) * torch.exp(1j * angle.double())[:, None]
    pairs = torch.stack((z.real, z.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((pairs, x[..., r:].double()), -1)


@every_dtype
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(
    "sizes", [(2, 4, 4, 8, 16, 16), (3, 6, 2, 7, 11, 4), (1, 1, 1, 1, 2, 2), (2, 2, 2, 0, 4, 4)]
)
def test_rope(sizes: tuple[int, ...], interleaved: bool, dtype: torch.dtype) -> None:
    b, h, hk, s, d, r = sizes
    q, k = swapped(rand(b, h, s, d, dtype=dtype)), rand(b, hk, s, d, dtype=dtype)
    for batch in {1, b}:
        angle = rand(batch, s, r // 2, dtype=F64) * 3
        table = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        got = ops.rope(q, k, table.cos(), table.sin(), r, interleaved)
        for ours, x in zip(got, (q, k), strict=True):
            assert ours.dtype == dtype and torch.equal(ours[..., r:], x[..., r:])
            close(ours, turned(x, angle, interleaved), dtype)


def test_rope_is_bitwise_what_models_write() -> None:
    q, k, angle = rand(2, 4, 5, 8), rand(2, 2, 5, 8), rand(1, 5, 8)
    cos, sin = angle.cos(), angle.sin()

    def rotate_half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., 4:], x[..., :4]), -1)

    ours = ops.rope(q, k, cos, sin, 8)
    assert torch.equal(ours[0], q * cos[:, None] + rotate_half(q) * sin[:, None])
    assert torch.equal(ours[1], k * cos[:, None] + rotate_half(k) * sin[:, None])


# -------------------------------------------------------------------------------------- linear, mlp and cache


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}


@every_dtype
@pytest.mark.parametrize("kind", FORMULAS)
def test_activations(kind: str, dtype: torch.dtype) -> None:
    gate, up = rand(7, 123, dtype=dtype) * 2, rand(7, 123, dtype=dtype).flip(0)
    close(ops.activation(gate, kind), FORMULAS[kind](gate.double()), dtype)
    close(ops.gated_activation(gate, up, kind), FORMULAS[kind](gate.double()) * up.double(), dtype)
    x, w, b = rand(5, 16, dtype=dtype) / 4, rand(123, 16, dtype=dtype), rand(123, dtype=dtype)
    y = F.linear(x, w, b)
    expected = FORMULAS[kind](y.double()) + up[:5].double()
    close(fused(x, w, b, activation=kind, residual=up[:5]), expected, dtype)
    both = fused(x, torch.cat((w, w.flip(0))), activation=kind, gated=True)
    close(both, FORMULAS[kind](F.linear(x, w).double()) * F.linear(x, w.flip(0)).double(), dtype)


def test_every_kind_has_a_formula() -> None:
    with pytest.raises(ValueError) as raised:
        ops.activation(rand(1), "?")
    assert str(raised.value).endswith(f"one of {', '.join(FORMULAS)}")


@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (6,)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = rand(*shape, dtype=dtype), rand(9, shape[-1], dtype=dtype), rand(9, dtype=dtype)
    scale = max(shape[-1], 1) ** -0.5
    close(ops.linear(x * scale, w, b), (x * scale).double() @ w.double().T + b.double(), dtype)
    assert torch.equal(ops.linear(x, w, b), F.linear(x, w, b))
    assert torch.equal(fused(x, w), F.linear(x, w))


def test_results_promote_as_eager_does() -> None:
    half, single, scalar = rand(3, 4, dtype=F16), rand(3, 4), torch.tensor(2.0)
    w = rand(4, 4, dtype=F16)
    assert ops.gated_activation(half, single, "silu").dtype == (F.silu(half) * single).dtype == F32
    assert ops.gated_activation(half, half, "silu").dtype == F16
    assert fused(half, w, residual=single).dtype == (F.linear(half, w) + single).dtype == F32
    assert fused(half, w, residual=scalar).dtype == (F.linear(half, w) + scalar).dtype == F16


@every_dtype
def test_cache_update(dtype: torch.dtype) -> None:
    cache, new = rand(2, 3, 7, 4, dtype=dtype), swapped(rand(2, 3, 2, 4, dtype=dtype))
    grown = ops.cache_update(cache, new, None)
    assert grown.shape == (2, 3, 9, 4)
    assert torch.equal(grown[:, :, :7], cache) and torch.equal(grown[:, :, 7:], new)
    for index in (torch.int64, torch.int32):
        written = ops.cache_update(cache, new, torch.tensor([6, 2], dtype=index))
        assert torch.equal(written[:, :, 6], new[:, :, 0]) and torch.equal(written[:, :, 2], new[:, :, 1])
        kept = [0, 1, 3, 4, 5]
        assert torch.equal(written[:, :, kept], cache[:, :, kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_collectives_of_one_rank_are_copies(dtype: torch.dtype) -> None:
    x = rand(3, 5, dtype=dtype)
    for result in (ops.all_reduce(x, "tp"), ops.all_gather(x, "tp", 1), ops.reduce_scatter(x, "tp", 0)):
        assert torch.equal(result, x) and result.data_ptr() != x.data_ptr()
