"""Calls of every op over tidy, ugly, single, empty, permuted and expanded inputs, for the tests of ops."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt import ops

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)


def rand(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Normal numbers, the same at each call of the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F32).to(dtype)


def swapped(x: Tensor) -> Tensor:
    """The same values in memory that is laid out as models do: [B, S, H, D] seen as [B, H, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A call of an op: positional arguments for a dtype, and keywords."""

    op: ops.Op
    label: str
    arguments: Callable[[torch.dtype], tuple[object, ...]]
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op.__name__}-{self.label}"


def norm_cases() -> list[Case]:
    """Norms over tidy, ugly, single, empty, permuted and expanded inputs."""
    inputs: dict[str, Callable[[torch.dtype], Tensor]] = {
        "tidy": lambda d: rand(2, 4, 64, dtype=d),
        "ugly": lambda d: rand(7, 123, dtype=d),
        "single": lambda d: rand(1, 1, 1, dtype=d),
        "vector": lambda d: rand(5, dtype=d),
        "no rows": lambda d: rand(0, 5, dtype=d),
        "no columns": lambda d: rand(3, 0, dtype=d),
        "permuted": lambda d: rand(5, 3, 7, dtype=d).permute(2, 0, 1),
        "expanded": lambda d: rand(1, 6, dtype=d).expand(4, 6),
        "sliced": lambda d: rand(4, 12, dtype=d)[:, ::2],
    }
    cases = []
    for label, x in inputs.items():
        w = lambda d, x=x: rand(x(d).shape[-1], dtype=d)
        cases += [
            Case(ops.rms_norm, label, lambda d, x=x, w=w: (x(d), w(d), 1e-6)),
            Case(ops.rms_norm, f"{label} in fp32", lambda d, x=x, w=w: (x(d), w(F32), 1e-6)),
            Case(ops.rms_norm, f"{label} bare", lambda d, x=x: (x(d), None, 1e-6)),
            Case(ops.rms_norm, f"{label} late", lambda d, x=x, w=w: (x(d), w(d), 1e-6, 1.0, False)),
            Case(ops.add_rms_norm, label, lambda d, x=x, w=w: (x(d), x(d), w(d), 1e-6)),
            Case(ops.layer_norm, label, lambda d, x=x, w=w: (x(d), w(d), w(d), 1e-5)),
            Case(ops.layer_norm, f"{label} bare", lambda d, x=x: (x(d), None, None, 1e-5)),
            Case(ops.add_layer_norm, label, lambda d, x=x, w=w: (x(d), x(d), w(d), None, 1e-5)),
            Case(ops.activation, label, lambda d, x=x: (x(d), "quick_gelu")),
            Case(ops.gated_activation, label, lambda d, x=x: (x(d), x(d), "silu")),
            Case(ops.all_reduce, label, lambda d, x=x: (x(d), "tp", "max")),
            Case(ops.all_gather, label, lambda d, x=x: (x(d), "tp", -1)),
            Case(ops.reduce_scatter, label, lambda d, x=x: (x(d), "tp", 0)),
        ]
    broadcast = lambda d: (rand(2, 3, 5, dtype=d), rand(3, 5, dtype=d), rand(5, dtype=d))
    cases.append(Case(ops.add_rms_norm, "broadcast", lambda d: (*broadcast(d), 1e-6)))
    cases.append(Case(ops.add_layer_norm, "broadcast", lambda d: (*broadcast(d), rand(5, dtype=d), 1e-5)))
    return cases


def rope_cases() -> list[Case]:
    """Full and partial rotation in both layouts; (B, H, Hk, S, D, rotary_dim)."""
    sizes = [
        (2, 4, 4, 8, 16, 16),
        (3, 6, 2, 7, 10, 4),
        (1, 1, 1, 1, 2, 2),
        (2, 3, 1, 0, 6, 6),
        (1, 2, 2, 5, 7, 0),
    ]
    cases = []
    for b, h, hk, s, d, r in sizes:

        def arguments(
            dtype: torch.dtype, b: int = b, h: int = h, hk: int = hk, s: int = s, d: int = d, r: int = r
        ) -> tuple[object, ...]:
            angle = rand(1, s, r)
            q, k = swapped(rand(b, h, s, d, dtype=dtype)), rand(b, hk, s, d, dtype=dtype)
            return q, k, angle.cos().to(dtype), angle.sin(), r

        for interleaved in (False, True):
            label = f"{(b, h, hk, s, d, r)} {'pairs' if interleaved else 'halves'}"
            cases.append(Case(ops.rope, label, arguments, {"interleaved": interleaved}))
    return cases


def attention_cases() -> list[Case]:
    """Attention at (B, H, Hk, Q, K, D, Dv), plain and with everything."""
    sizes = [
        (2, 4, 4, 8, 8, 16, 16),
        (3, 6, 2, 5, 7, 10, 6),
        (1, 1, 1, 1, 1, 1, 1),
        (2, 4, 2, 0, 3, 8, 8),
        (2, 4, 2, 3, 0, 8, 8),
        (0, 4, 2, 3, 3, 8, 8),
    ]
    cases = []
    for b, h, hk, q, k, d, dv in sizes:

        def qkv(
            dtype: torch.dtype,
            b: int = b,
            h: int = h,
            hk: int = hk,
            q: int = q,
            k: int = k,
            d: int = d,
            dv: int = dv,
        ) -> tuple[object, ...]:
            return (
                swapped(rand(b, h, q, d, dtype=dtype)),
                swapped(rand(b, hk, k, d, dtype=dtype)),
                rand(b, hk, k, dv, dtype=dtype),
                0.3,
            )

        everything = {
            "causal": True,
            "offset": 1,
            "offset_tensor": torch.tensor([1]),
            "window": 3,
            "key_padding": torch.arange(k).expand(b, k) > 0,
            "bias": rand(1, h, 1, k),
            "softcap": 5.0,
            "sinks": rand(h),
        }
        for op in (ops.attention, ops.attention_lse):
            cases.append(Case(op, f"{(b, h, hk, q, k, d, dv)}", qkv))
            cases.append(
                Case(
                    op,
                    f"{(b, h, hk, q, k, d, dv)} causal mean",
                    qkv,
                    {"causal": True, "offset": -2, "empty_rows_mean": True},
                )
            )
            cases.append(Case(op, f"{(b, h, hk, q, k, d, dv)} everything", qkv, everything))
    return cases


def scores_cases() -> list[Case]:
    """Logits alone at (B, H, Q, K, D)."""
    cases = []
    for b, h, n, m, d in ((2, 4, 8, 8, 16), (3, 2, 5, 7, 10), (1, 1, 1, 1, 1), (2, 2, 3, 0, 4)):
        qk = lambda t, b=b, h=h, n=n, m=m, d=d: (rand(b, h, n, d, dtype=t), rand(b, h, m, d, dtype=t), 0.3)
        hidden = {"bias": rand(b, 1, n, m) > 0, "softcap": 5.0, "empty_rows_mean": True}
        cases.append(Case(ops.attention_scores, f"{(b, h, n, m, d)}", qk))
        cases.append(Case(ops.attention_scores, f"{(b, h, n, m, d)} hidden", qk, hidden))
    return cases


def linear_cases() -> list[Case]:
    """Linear layers at (..., in, out), with and without what follows."""
    cases = []
    for shape, out in (
        ((2, 3, 16), 8),
        ((7, 123), 5),
        ((1, 1, 1), 1),
        ((6,), 4),
        ((0, 6), 4),
        ((3, 0), 4),
        ((3, 6), 0),
    ):
        x = lambda d, shape=shape: rand(*shape, dtype=d)
        wb = lambda d, shape=shape, out=out: (rand(out, shape[-1], dtype=d), rand(out, dtype=d))
        y = lambda d, shape=shape, out=out: rand(*shape[:-1], out, dtype=d)
        cases += [
            Case(ops.linear, f"{shape} {out}", lambda d, x=x, wb=wb: (x(d), *wb(d))),
            Case(ops.linear, f"{shape} {out} bare", lambda d, x=x, wb=wb: (x(d), wb(d)[0], None)),
            Case(
                ops.linear_epilogue,
                f"{shape} {out}",
                lambda d, x=x, wb=wb, y=y: (x(d), *wb(d), "gelu", y(d), y(F32)),
            ),
            Case(
                ops.linear_epilogue,
                f"{shape} {out} bare",
                lambda d, x=x, wb=wb: (x(d), *wb(d), None, None, None),
            ),
        ]
    permuted = lambda d: rand(4, 3, 6, dtype=d).transpose(0, 1)
    cases.append(Case(ops.linear, "permuted", lambda d: (permuted(d), rand(5, 6, dtype=d), None)))
    return cases


def cache_cases() -> list[Case]:
    """Caches (B, H, L, S, D), appended to and written at positions."""
    cases = []
    for b, h, length, s, d in (
        (2, 3, 8, 2, 4),
        (3, 1, 7, 5, 3),
        (1, 1, 1, 1, 1),
        (2, 2, 0, 3, 4),
        (2, 2, 5, 0, 4),
    ):
        both = lambda t, b=b, h=h, n=length, s=s, d=d: (
            rand(b, h, n, d, dtype=t),
            swapped(rand(b, h, s, d, dtype=t)),
        )
        cases.append(
            Case(ops.cache_update, f"{(b, h, length, s, d)} appended", lambda t, both=both: (*both(t), None))
        )
        if s <= length:
            at = lambda t, both=both, s=s, n=length: (*both(t), torch.arange(n - s, n))
            cases.append(Case(ops.cache_update, f"{(b, h, length, s, d)} written", at))
    return cases


CASES = [*norm_cases(), *rope_cases(), *attention_cases(), *scores_cases(), *linear_cases(), *cache_cases()]


def tensors(outputs: object) -> tuple[Tensor, ...]:
    """An op's results as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)  # type: ignore[arg-type]


def first_case(op: ops.Op) -> Case:
    """The tidy case of an op."""
    return next(case for case in CASES if case.op is op)
