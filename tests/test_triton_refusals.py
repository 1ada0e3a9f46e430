"""Why Triton kernels refuse: each reason, by value and limit; and what they must not refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from graphopt import ops
from graphopt.defaults import KERNELS
from graphopt.kernel import Kernel
from graphopt.kernels.linear_triton import FEW_ROWS
from graphopt.targets import CPU
from tests.graphs import Builder, node_of

GPU_KERNELS = tuple(k for k in KERNELS if k.target != CPU)
F64, BF16 = torch.float64, torch.bfloat16


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of those sizes; only described, so that large ones cost nothing."""
    return torch.empty(shape, dtype=dtype, device="meta")


def kernel_named(name: str) -> Kernel:
    return next(k for k in GPU_KERNELS if k.name == name)


def refusal(name: str, arguments: Sequence[object]) -> str | None:
    """What a kernel says to a call of its op."""
    kernel = kernel_named(name)
    return kernel.refuses(node_of(getattr(ops, kernel.op).overload, arguments))


X, W, HALF_X = tensor(2, 3, 8), tensor(8), tensor(2, 3, 8, dtype=BF16)
X64, W64 = tensor(2, 3, 8, dtype=F64), tensor(8, dtype=F64)
Q, K, TABLE = tensor(2, 4, 5, 8), tensor(2, 2, 5, 8), tensor(1, 5, 8)
HALF_Q, HALF_K = Q.to(BF16), K.to(BF16)
CACHE, POSITION = tensor(2, 2, 16, 8), tensor(5, dtype=torch.int64)
NO_FP64 = "is not float32, float16 or bfloat16"


def write(
    q: torch.Tensor = Q,
    k: torch.Tensor = K,
    v: torch.Tensor = K,
    table: torch.Tensor = TABLE,
    norm: torch.Tensor | None = None,
    cast: bool = True,
    cache: torch.Tensor = CACHE,
) -> tuple[object, ...]:
    """Arguments of `rope_write`."""
    size = table.shape[-1]
    return (q, k, v, table, table, size, False, norm, norm, 1e-6, 0.0, cast, cache, cache, POSITION, None)


def fused(x: torch.Tensor = X, weight: torch.Tensor | None = None, **parts: object) -> tuple[object, ...]:
    """Arguments of `fused_linear`; `parts` by name."""
    defaults: dict[str, object] = {
        "scales": None,
        "bias": None,
        "norm": None,
        "norm_weight": None,
        "norm_bias": None,
        "eps": 0.0,
        "weight_offset": 0.0,
        "cast_before_scale": True,
        "activation": None,
        "gated": False,
        "residual": None,
    }
    assert parts.keys() <= defaults.keys()
    return (x, tensor(4, 8) if weight is None else weight, *(defaults | parts).values())


MANY = tensor(1, 21846, 1, 8)  # heads
WIDE, WIDE_TABLE = tensor(1, 2, 5, 257), tensor(1, 5, 8)
WIDE_V, LONG = tensor(2, 2, 5, 257), tensor(1, 2, 5, 2049)
CODES, SCALES = tensor(4, 24, dtype=torch.int8), tensor(4, 2)

REFUSALS = [
    ("rms_norm_triton", (X64, W64, 1e-6), f"dtype torch.float64 of x {NO_FP64}"),
    ("rms_norm_triton", (X, W64, 1e-6), f"dtype torch.float64 of weight {NO_FP64}"),
    ("add_rms_norm_triton", (X, X64, W, 1e-6), f"dtype torch.float64 of residual {NO_FP64}"),
    (
        "add_rms_norm_triton",
        (X, tensor(2, 3, 1), W, 1e-6),
        "residual is (2, 3, 1), x is (2, 3, 8): the last size differs",
    ),
    ("add_rms_norm_triton", (X, tensor(), W, 1e-6), "residual is (), x is (2, 3, 8): the last size differs"),
    ("rms_norm_residual_triton", (X, W, 1e-6, 0.0, True, W), "residual is (8,), x is (2, 3, 8)"),
    (
        "rms_norm_residual_triton",
        (X, W, 1e-6, 0.0, True, X64),
        f"dtype torch.float64 of residual {NO_FP64}",
    ),
    ("layer_norm_triton", (X, W, W64, 1e-6), f"dtype torch.float64 of bias {NO_FP64}"),
    ("add_layer_norm_triton", (X, X64, W, None, 1e-6), f"dtype torch.float64 of residual {NO_FP64}"),
    (
        "add_layer_norm_triton",
        (tensor(2, 3, 1), X, W, W, 1e-6),
        "residual is (2, 3, 8), x is (2, 3, 1): the last size differs",
    ),
    ("rope_triton", (Q, K, TABLE.double(), TABLE, 8), f"dtype torch.float64 of cos {NO_FP64}"),
    ("rope_triton", (WIDE, WIDE, WIDE_TABLE, WIDE_TABLE, 8), "head_dim 257 > 256"),
    (
        "rope_triton",
        (Q, tensor(2, 2, 5, 16), TABLE, TABLE, 8),
        "k is (2, 2, 5, 16), q is (2, 4, 5, 8): more than the number of heads differs",
    ),
    (
        "rope_triton",
        (Q, tensor(1, 2, 5, 8), TABLE, TABLE, 8),
        "k is (1, 2, 5, 8), q is (2, 4, 5, 8): more than the number of heads differs",
    ),
    (
        "rope_triton",
        (tensor(70000, 1, 1, 8), tensor(70000, 1, 1, 8), tensor(1, 1, 8), tensor(1, 1, 8), 8),
        "batch 70000 > 65535, the most programs in that direction",
    ),
    ("rope_write_triton", write(table=TABLE.double()), f"dtype torch.float64 of cos {NO_FP64}"),
    (
        "rope_write_triton",
        write(q=tensor(1, 4, 5, 8)),
        "k is (2, 2, 5, 8), q is (1, 4, 5, 8): more than the number of heads differs",
    ),
    (
        "rope_write_triton",
        write(HALF_Q, HALF_K, HALF_K, norm=W, cache=CACHE.to(BF16)),
        "q_norm is torch.float32, q is torch.bfloat16: the result would be promoted",
    ),
    (
        "rope_write_triton",
        write(HALF_Q, norm=W.to(BF16)),
        "k_norm is torch.bfloat16, k is torch.float32: the result would be promoted",
    ),
    (
        "rope_write_triton",
        write(v=tensor(2, 2, 4, 8)),
        "v is (2, 2, 4, 8), k is (2, 2, 5, 8): another batch or length",
    ),
    (
        "cache_write_triton",
        (K, tensor(2, 2, 4, 8), CACHE, CACHE, POSITION, None),
        "v is (2, 2, 4, 8), k is (2, 2, 5, 8): another batch or length",
    ),
    (
        "cache_write_triton",
        (K.double(), K.double(), CACHE.double(), CACHE.double(), POSITION, None),
        f"dtype torch.float64 of k {NO_FP64}",
    ),
    (
        "cache_write_triton",
        (MANY, MANY, MANY, MANY, tensor(1, dtype=torch.int64), None),
        "number of heads 21846 > 21845, the most programs in that direction",
    ),
    ("cache_update_triton", (CACHE.double(), K.double(), None), f"dtype torch.float64 of cache {NO_FP64}"),
    (
        "cache_update_triton",
        (MANY, MANY, None),
        "number of heads 21846 > 21845, the most programs in that direction",
    ),
    ("cache_update_triton", (LONG, LONG, None), "head_dim 2049 > 2048"),
    ("cache_write_triton", (LONG, LONG, LONG, LONG, POSITION, None), "k's head_dim 2049 > 2048"),
    (
        "cache_write_triton",
        (K, LONG, CACHE, tensor(1, 2, 16, 2049), POSITION, None),
        "v is (1, 2, 5, 2049), k is (2, 2, 5, 8): another batch or length",
    ),
    (
        "cache_write_triton",
        (K[:1], LONG, CACHE[:1], tensor(1, 2, 16, 2049), POSITION, None),
        "v's head_dim 2049 > 2048",
    ),
    (
        "rope_write_triton",
        (*write(v=WIDE_V)[:13], tensor(2, 2, 16, 257), POSITION, None),
        "v's head_dim 257 > 256",
    ),
    (
        "rope_write_triton",
        write(WIDE, WIDE, WIDE, WIDE_TABLE, cache=tensor(1, 2, 16, 257)),
        "v's head_dim 257 > 256",
    ),
    (
        "rope_write_triton",
        (*write(WIDE, WIDE, WIDE[..., :8], WIDE_TABLE, cache=WIDE)[:13], WIDE[..., :8], POSITION, None),
        "head_dim 257 > 256",
    ),
    ("activation_triton", (X64, "silu"), f"dtype torch.float64 of x {NO_FP64}"),
    ("gated_activation_triton", (X, X64, "silu"), f"dtype torch.float64 of up {NO_FP64}"),
    ("gated_activation_triton", (X, W, "silu"), "gate is (2, 3, 8), up is (8,)"),
    ("gated_activation_triton", (tensor(2, 1, 8), X, "silu"), "gate is (2, 1, 8), up is (2, 3, 8)"),
    ("linear_aten", (X, tensor(4, 8), None), f"6 rows <= {FEW_ROWS}"),
    (
        "linear_aten",
        (tensor(FEW_ROWS + 1, 8), tensor(4, 8, dtype=BF16), None),
        "weight is torch.bfloat16, x is torch.float32",
    ),
    ("linear_triton", (X64, tensor(4, 8, dtype=F64), None), f"dtype torch.float64 of x {NO_FP64}"),
    ("linear_triton", (HALF_X, tensor(4, 8), None), "weight is torch.float32, x is torch.bfloat16"),
    ("linear_int8_triton", (tensor(3, 24), CODES, SCALES, None), "group 12 is no multiple of 16"),
    (
        "linear_int8_triton",
        (tensor(3, 24, dtype=F64), CODES, SCALES, None),
        f"dtype torch.float64 of x {NO_FP64}",
    ),
    ("fused_linear_triton", fused(tensor(3, 24), CODES, scales=SCALES), "group 12 is no multiple of 16"),
    ("fused_linear_triton", fused(HALF_X), "weight is torch.float32, x is torch.bfloat16"),
    (
        "fused_linear_triton",
        fused(HALF_X, tensor(4, 8, dtype=BF16), norm="rms", norm_weight=W),
        "norm_weight is torch.float32, x is torch.bfloat16, and the row is cast before it",
    ),
    (
        "fused_linear_triton",
        fused(residual=tensor(2, 3, 4, dtype=torch.int64)),
        "residual is torch.int64, which is not floating point",
    ),
    (
        "fused_linear_triton",
        fused(residual=tensor(5, 2, 3, 4)),
        "residual is (5, 2, 3, 4), the result is (2, 3, 4)",
    ),
]

# The same for every kernel of attention, with its sum of exponentials or without.
ATTENTION = tuple(k.name for k in GPU_KERNELS if k.op.startswith("attention"))
SPLIT = tuple(name for name in ATTENTION if "split" in name)
BROAD = tensor(1, 2, 1, 257)
ATTENTION_REFUSALS = [
    ((Q.double(), K.double(), K.double(), 0.5), "dtype torch.float64 is not float16, bfloat16 or float32"),
    ((Q, K.to(BF16), K, 0.5), "q is torch.float32, k torch.bfloat16, v torch.float32"),
    ((Q, K, K.to(BF16), 0.5), "q is torch.float32, k torch.float32, v torch.bfloat16"),
    ((BROAD, BROAD, tensor(1, 2, 1, 8), 0.5), "head_dim 257 > 256"),
    ((tensor(1, 2, 1, 8), tensor(1, 2, 1, 8), BROAD, 0.5), "value dim 257 > 256"),
    ((tensor(1, 2, 1, 0), tensor(1, 2, 1, 0), tensor(1, 2, 1, 8), 0.5), "head_dim 0 < 1"),
    (
        (Q, K, K, 0.5, False, 0, None, None, None, tensor(5, 5, dtype=F64)),
        "bias is torch.float64, q is torch.float32",
    ),
    (
        (Q, K, K, 0.5, False, 0, None, None, None, None, None, tensor(4, dtype=F64)),
        "sinks is torch.float64, q is torch.float32",
    ),
    ((Q, K, K, 0.5, False, 0, None, 2**30), "window 1073741824 >= 2^30"),
]


@pytest.mark.parametrize(("arguments", "reason"), ATTENTION_REFUSALS, ids=[r for _, r in ATTENTION_REFUSALS])
@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_refusal_names_value_and_limit(
    kernel: str, arguments: tuple[object, ...], reason: str
) -> None:
    assert refusal(kernel, arguments) == reason


@pytest.mark.parametrize("kernel", SPLIT)
def test_split_attention_is_for_few_queries(kernel: str) -> None:
    q, k = tensor(1, 4, 17, 8), tensor(1, 2, 17, 8)
    assert refusal(kernel, (q, k, k, 0.5)) == "17 queries > 16"
    assert refusal(kernel, (q[:, :, :16], k, k, 0.5)) is None


@pytest.mark.parametrize(
    ("kernel", "arguments", "reason"), REFUSALS, ids=[f"{k}-{r}" for k, _, r in REFUSALS]
)
def test_refusal_names_value_and_limit(kernel: str, arguments: tuple[object, ...], reason: str) -> None:
    assert refusal(kernel, arguments) == reason


def test_every_kernel_has_a_refusal_here() -> None:
    assert {k.name for k in GPU_KERNELS} == {name for name, _, _ in REFUSALS} | {*ATTENTION}


# ------------------------------------------------------------------------------------- what they must take

ACCEPTED = {
    "fp32 weight of a norm": ("rms_norm_triton", (HALF_X, W, 1e-6)),
    "shifted weight": ("rms_norm_triton", (HALF_X, W, 1e-6, 1.0, False)),
    "no weight": ("add_rms_norm_triton", (X, X, None, 1e-6)),
    "fp32 residual": ("add_rms_norm_triton", (HALF_X, X, W, 1e-6)),
    "residual of one row": ("add_rms_norm_triton", (X, W, W, 1e-6)),
    "positions of a batch": ("add_layer_norm_triton", (X, tensor(1, 3, 8), W, W, 1e-6)),
    "bias alone": ("layer_norm_triton", (X, None, W, 1e-6)),
    "more columns than registers": ("rms_norm_triton", (tensor(2, 200000), tensor(200000), 1e-6)),
    "fp32 tables": ("rope_triton", (HALF_Q, HALF_K, TABLE, TABLE, 8)),
    "odd half": ("rope_triton", (Q, K, tensor(1, 5, 6), tensor(1, 5, 6), 6, True)),
    "fp32 norm, cast after": ("rope_write_triton", write(HALF_Q, HALF_K, HALF_K, norm=W, cast=False)),
    "two dtypes": ("gated_activation_triton", (X, HALF_X, "gelu")),
    "appended": ("cache_update_triton", (CACHE, K, None)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_kernel_takes_what_models_have(name: str) -> None:
    kernel, arguments = ACCEPTED[name]
    if name == "fp32 norm, cast after":
        arguments = (*arguments[:12], CACHE.to(BF16), CACHE.to(BF16), *arguments[14:])
    assert refusal(kernel, arguments) is None


def test_symbolic_sizes_are_no_reason() -> None:
    build = Builder()
    tokens = build.size("tokens", 7)
    x, weight = build.input("x", 1, tokens, 8), build.weight("w", 8)
    q, k = build.input("q", 1, 4, tokens, 8), build.input("k", 1, 2, tokens, 8)
    table, cache = build.input("table", 1, tokens, 8), build.input("cache", 1, 2, 16, 8)
    position = build.input("position", tokens, dtype=torch.int64)
    nothing = (8, False, None, None, 1e-6, 0.0, True)
    calls = {
        "rms_norm_triton": (x, weight, 1e-6),
        "add_rms_norm_triton": (x, x, weight, 1e-6),
        "rms_norm_residual_triton": (x, weight, 1e-6, 0.0, True, x),
        "add_layer_norm_triton": (x, x, weight, None, 1e-6),
        "rope_triton": (q, k, table, table, 8),
        "rope_write_triton": (q, k, k, table, table, *nothing, cache, cache, position, None),
        "cache_write_triton": (k, k, cache, cache, position, None),
        "cache_update_triton": (cache, k, position),
        "gated_activation_triton": (x, x, "silu"),
    }
    for name, arguments in calls.items():
        kernel = kernel_named(name)
        node = build.call(getattr(ops, kernel.op).overload, *arguments)
        assert kernel.refuses(node) is None, name


def test_a_symbolic_head_dim_is_refused() -> None:
    build = Builder()
    size = build.size("size", 8)
    q, table = build.input("q", 1, 4, 5, size), build.input("table", 1, 5, 8)
    node = build.call(ops.rope.overload, q, q, table, table, 8)
    reason = kernel_named("rope_triton").refuses(node)
    assert reason is not None and re.fullmatch(r"head_dim is \w+, no plain number", reason)
