"""Calls of every op over tidy, ugly, single, empty, permuted and expanded inputs, for the tests of ops."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt import ops
from tests.tensors import rand

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)


def codes(*shape: int) -> Tensor:
    """Numbers of int8."""
    return (rand(*shape) * 40).round().clamp(-127, 127).to(torch.int8)


def swapped(x: Tensor) -> Tensor:
    """The same values in memory that is laid out as models do: [B, S, H, D] seen as [B, H, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, **parts: object
) -> tuple[object, ...]:
    """The arguments of `fused_linear` in order, with only those parts that are given."""
    plain: dict[str, object] = dict.fromkeys(inspect.signature(ops.fused_linear).parameters)
    plain |= {"x": x, "weight": weight, "bias": bias, "eps": 0.0, "weight_offset": 0.0}
    return tuple((plain | {"cast_before_scale": True, "gated": False} | parts).values())


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, **parts: object) -> Tensor:
    """A `fused_linear` with only those parts that are given."""
    return ops.fused_linear(*fused_arguments(x, weight, bias, **parts))  # type: ignore[arg-type]  # in order


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
            Case(ops.rms_norm_residual, label, lambda d, x=x, w=w: (x(d), w(d), 1e-6, 0.0, True, x(d))),
            Case(
                ops.rms_norm_residual, f"{label} late", lambda d, x=x: (x(d), None, 0.5, 0.0, False, x(F32))
            ),
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
        cases.append(Case(ops.attention_weights, f"{(b, h, n, m, d)}", qk))
        sunk = {**hidden, "sinks": rand(h), "empty_rows_mean": False}
        cases.append(Case(ops.attention_weights, f"{(b, h, n, m, d)} with sinks", qk, sunk))
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
        ]
        v = lambda d, shape=shape: rand(shape[-1], dtype=d)
        parts: dict[str, Callable[[torch.dtype], dict[str, object]]] = {
            "bare": lambda d: {},
            "added to": lambda d, y=y: {"activation": "gelu", "residual": y(F32)},
            "gated": lambda d: {"activation": "silu", "gated": True},
            "rms": lambda d, v=v, y=y: {"norm": "rms", "norm_weight": v(d), "eps": 1e-6, "residual": y(d)},
            "late rms": lambda d, v=v: {
                "norm": "rms", "norm_weight": v(F32), "eps": 0.5, "weight_offset": 1.0,
                "cast_before_scale": False,
            },
            "layer": lambda d, v=v: {"norm": "layer", "norm_weight": v(d), "norm_bias": v(d), "eps": 1e-5},
        }  # fmt: skip
        for what, of in parts.items():
            pairs = lambda d, wb=wb, twice=what == "gated": [torch.cat((t, t)) if twice else t for t in wb(d)]
            cases.append(
                Case(
                    ops.fused_linear,
                    f"{shape} {out} {what}",
                    lambda d, x=x, pairs=pairs, of=of: fused_arguments(x(d), *pairs(d), **of(d)),
                )
            )
        if shape[-1]:
            packed = lambda d, k=shape[-1], out=out: (codes(out, k), rand(out, dtype=d))
            cases.append(
                Case(
                    ops.fused_linear,
                    f"{shape} {out} int8",
                    lambda d, x=x, packed=packed, out=out: fused_arguments(
                        x(d), *packed(d), scales=rand(out, 1, dtype=d), activation="relu"
                    ),
                )
            )
    permuted = lambda d: rand(4, 3, 6, dtype=d).transpose(0, 1)
    cases.append(Case(ops.linear, "permuted", lambda d: (permuted(d), rand(5, 6, dtype=d), None)))
    return cases


def expert_cases() -> list[Case]:
    """Experts at (T, k, E, H, I, N), gated and not, with and without what else there is; rows by matrix."""
    cases = []
    for t, k, e, h, i, n in (
        (6, 2, 4, 16, 8, 16),
        (7, 3, 5, 13, 5, 11),
        (1, 1, 1, 1, 1, 1),
        (0, 2, 4, 8, 6, 8),
        (3, 0, 4, 8, 6, 8),
    ):
        x = lambda d, t=t, h=h: rand(t, h, dtype=d)
        ids = (rand(t, k) * 7).long().abs() % e
        share = lambda d, t=t, k=k: rand(t, k, dtype=d)
        pair = lambda d, e=e, h=h, i=i, n=n: (rand(e, 2 * i, h, dtype=d), rand(e, n, i, dtype=d))
        plain = lambda d, e=e, h=h, i=i, n=n: (rand(e, i, h, dtype=d), rand(e, n, i, dtype=d))
        biases = lambda d, e=e, i=i, n=n: (rand(e, 2 * i, dtype=d), rand(e, n, dtype=d))
        label = f"{(t, k, e, h, i, n)}"
        cases += [
            Case(
                ops.experts, label, lambda d, x=x, ids=ids, s=share, w=pair: (x(d), ids, s(d), *w(d), "silu")
            ),
            Case(
                ops.experts,
                f"{label} limited",
                lambda d, x=x, ids=ids, s=share, w=pair, b=biases: (
                    *(x(d), ids, s(F32), *w(d), "quick_gelu", True, True, *b(d), 1.5, 1.0),
                ),
            ),
            Case(
                ops.experts,
                f"{label} plain",
                lambda d, x=x, ids=ids, w=plain: (x(d), ids, None, *w(d), "relu2", False),
            ),
            Case(
                ops.experts,
                f"{label} scaled",
                lambda d, x=x, ids=ids, s=share, w=pair: (
                    *(x(d), ids, s(d), *w(d), "silu", True, False, None, None, None, 0.0, True),
                ),
            ),
            Case(
                ops.experts,
                f"{label} softcapped",
                lambda d, x=x, ids=ids, s=share, w=pair: (
                    *(x(d), ids, s(d), *w(d), "silu", True, False, None, None, None, 0.0, False, 1.5, 2.5),
                ),
            ),
            Case(
                ops.experts,
                f"{label} all",
                lambda d, x=x, t=t, e=e, w=pair, b=biases: (
                    *(x(d), None, rand(t, e, dtype=d), *w(d), "gelu", True, False, *b(d)),
                ),
            ),
        ]
        if k:
            rows, some = ids[:, 0], lambda d, e=e, n=n: rand(e, n, dtype=d)
            w = lambda d, e=e, h=h, n=n: rand(e, h, n, dtype=d)
            cases += [
                Case(ops.expert_matmul, label, lambda d, x=x, w=w, rows=rows: (x(d), w(d), rows)),
                Case(
                    ops.expert_matmul,
                    f"{label} biased",
                    lambda d, x=x, w=w, rows=rows, b=some: (x(d), w(d), rows, b(d)),
                ),
            ]
    return cases


def quantized_cases() -> list[Case]:
    """Weights [N, K] in groups, and linears on them at x [..., K]."""
    cases = []
    for shape, n, group in (
        ((2, 3, 128), 8, 64),
        ((7, 51), 5, 3),
        ((1, 1, 1), 1, 1),
        ((24,), 4, 24),
        ((0, 6), 4, 2),
        ((3, 0), 4, 2),
        ((3, 6), 0, 2),
    ):
        w = lambda d, n=n, k=shape[-1]: rand(n, k, dtype=d)
        s = lambda d, w=w, group=group: ops.scales_int8.reference(w(d), group)
        p = lambda d, w=w, s=s: ops.pack_int8.reference(w(d), s(d))
        x, label = lambda d, shape=shape: rand(*shape, dtype=d), f"{shape} {n} {group}"
        cases += [
            Case(ops.scales_int8, label, lambda d, w=w, group=group: (w(d), group)),
            Case(ops.pack_int8, label, lambda d, w=w, s=s: (w(d), s(d))),
            Case(ops.linear_int8, label, lambda d, x=x, p=p, s=s, n=n: (x(d), p(d), s(d), rand(n, dtype=d))),
            Case(ops.linear_int8, f"{label} bare", lambda d, x=x, p=p, s=s: (x(d), p(F32), s(F32), None)),
        ]
    turned = lambda d: rand(12, 8, dtype=d).T
    cases.append(Case(ops.scales_int8, "transposed", lambda d: (turned(d), 4)))
    cases.append(Case(ops.pack_int8, "transposed", lambda d: (turned(d), rand(8, 3, dtype=d).abs())))
    return cases


def write_cases() -> list[Case]:
    """Keys and values (B, H, Hk, L, S, D) written to caches in place, rotated and not."""
    cases = []
    for b, h, hk, length, s, d in (
        (2, 4, 2, 8, 3, 6),
        (3, 2, 2, 7, 1, 4),
        (1, 1, 1, 1, 1, 2),
        (2, 2, 1, 4, 0, 2),
    ):
        kv = lambda t, b=b, hk=hk, s=s, d=d: (
            rand(b, hk, s, d, dtype=t),
            swapped(rand(b, hk, s, d, dtype=t)),
        )
        cached = lambda t, b=b, hk=hk, n=length, d=d: (rand(b, hk, n, d, dtype=t), rand(b, hk, n, d, dtype=t))
        q = lambda t, b=b, h=h, s=s, d=d: swapped(rand(b, h, s, d, dtype=t))
        turn = lambda t, s=s, d=d: (rand(1, s, d).cos().to(t), rand(1, s, d).sin(), d, False)
        at = lambda s=s, n=length: (torch.arange(n - s, n).flip(0), None)
        since = lambda s=s, n=length: (None, torch.tensor(n - s, dtype=torch.int32))
        norms = lambda t, d=d: (rand(d, dtype=t), rand(d, dtype=t), 1e-6, 1.0, False)
        sizes = f"{(b, h, hk, length, s, d)}"
        bare = lambda t: (None, None, 0.0, 0.0, True)
        for rows, norm in ((at, norms), (since, bare)):
            label = f"{sizes} {'at positions' if rows is at else 'since'}"
            plain = lambda t, kv=kv, c=cached, r=rows: (*kv(t), *c(t), *r())
            turned = lambda t, q=q, kv=kv, turn=turn, norm=norm, c=cached, r=rows: (
                *(q(t), *kv(t), *turn(t), *norm(t), *c(t), *r()),
            )
            cases += [Case(ops.cache_write, label, plain), Case(ops.rope_write, label, turned)]
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


CASES = [
    *norm_cases(),
    *rope_cases(),
    *attention_cases(),
    *scores_cases(),
    *linear_cases(),
    *expert_cases(),
    *quantized_cases(),
    *cache_cases(),
    *write_cases(),
]


def tensors(outputs: object) -> tuple[Tensor, ...]:
    """An op's results as a tuple."""
    if outputs is None:  # what only writes
        return ()
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)  # type: ignore[arg-type]


def first_case(op: ops.Op) -> Case:
    """The tidy case of an op."""
    return next(case for case in CASES if case.op is op)
