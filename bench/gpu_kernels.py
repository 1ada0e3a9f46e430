"""Each kernel on a GPU against the marks: bandwidth, matrix rate, and the best of torch in the same run.

    python -m bench.gpu_kernels [--folder DIR] [--seconds 240]

The ceilings (a large copy, a large bf16 product) are measured first. Each row is compared with the op's
reference before it is timed; both sides run from CUDA graphs, in turns, on rotated random buffers; each row
is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from bench import record
from bench.gpu_clock import Call, Turned, compare, copy_bandwidth, matrix_peak, rotations
from graphopt import ops
from graphopt.accuracy import judge
from graphopt.defaults import KERNELS
from graphopt.lowering.select import REFERENCE, kernel_for
from graphopt.targets import target_of

BF16 = torch.bfloat16
Arguments = Sequence[object]


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        name: what is computed, with its sizes.
        op: the op that computes it.
        make: its arguments, new random ones at each call.
        theirs: the best of torch on the same arguments.
        nbytes: the fewest bytes that must be moved; 0 where arithmetic is the bound.
        flops: operations; 0 where memory is the bound.
        marks: bar, goal and reach, as shares of the ceiling.
    """

    name: str
    op: ops.Op[..., object]
    make: Callable[[], Arguments]
    theirs: Callable[..., object]
    nbytes: int = 0
    flops: float = 0
    marks: tuple[float, float, float] = (0.0, 0.0, 0.0)


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.float32) * scale).to(dtype)


# ------------------------------------------------------------------------------------------------- norms


def norm(rows: int, width: int) -> Work:
    """add_rms_norm: reads two tensors and writes two."""

    def theirs(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float, *_: object) -> object:
        total = x + residual
        return F.rms_norm(total, (width,), w, eps), total

    return Work(
        f"add_rms_norm, {rows} x {width}", ops.add_rms_norm,
        lambda: (random(rows, width), random(rows, width), random(width), 1e-6, 0.0, True),
        theirs, nbytes=4 * 2 * rows * width, marks=(0.85, 0.92, 0.96),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- linears


def gemv(m: int, n: int, k: int) -> Work:
    """One token through a linear: the weight is read once."""
    return Work(
        f"linear bf16, {m} x {k} -> {n}", ops.linear,
        lambda: (random(m, k), random(n, k, scale=k**-0.5), None),
        F.linear, nbytes=2 * n * k, marks=(0.88, 0.93, 0.97),
    )  # fmt: skip


def gemv_int8(n: int, k: int, group: int = 64) -> Work:
    """One token through an int8 linear, of its own bytes; torch reads the same weight in bf16."""

    def make() -> Arguments:
        w = random(n, k, scale=k**-0.5)
        scales = ops.scales_int8.reference(w, group)
        return random(1, k), ops.pack_int8.reference(w, scales), scales, None

    def theirs(x: torch.Tensor, packed: torch.Tensor, *_: object) -> object:
        return F.linear(x, wide[packed.data_ptr()])

    wide = _Wide(n, k)
    nbytes = n * k + 2 * n * k // group
    return Work(
        f"linear int8, 1 x {k} -> {n}", ops.linear_int8, make, theirs, nbytes=nbytes, marks=(0.80, 0.88, 0.93)
    )


class _Wide(dict[int, torch.Tensor]):
    """A bf16 weight for each int8 one, made at the first call."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.shape = n, k

    def __missing__(self, key: int) -> torch.Tensor:
        made = self[key] = random(*self.shape, scale=self.shape[1] ** -0.5)
        return made


def fused(m: int, n: int, k: int, *, gated: bool) -> Work:
    """norm, product and SwiGLU of an MLP (gated), or product and residual; torch: its best pieces."""
    rows = 2 * n if gated else n

    def make() -> Arguments:
        norm_weight = random(k) if gated else None
        residual = None if gated else random(m, n)
        return (
            random(m, k), random(rows, k, scale=k**-0.5), None, None, "rms" if gated else None, norm_weight,
            None, 1e-6 if gated else 0.0, 0.0, True, "silu" if gated else None, gated, residual,
        )  # fmt: skip

    def theirs(x: torch.Tensor, w: torch.Tensor, *rest: object) -> object:
        norm_weight, residual = rest[3], rest[-1]
        if not gated:
            return torch.addmm(residual, x, w.T)
        assert isinstance(norm_weight, torch.Tensor)
        gate, up = F.linear(F.rms_norm(x, (k,), norm_weight, 1e-6), w).chunk(2, -1)
        return F.silu(gate) * up

    name = "norm + linear + SwiGLU" if gated else "linear + residual"
    if m <= 16:
        bound = {"nbytes": 2 * rows * k, "marks": (0.88, 0.93, 0.97)}
    else:
        bound = {"flops": 2 * m * rows * k, "marks": (0.85, 0.95, 1.0)}
    return Work(f"{name} bf16, {m} x {k} -> {n}", ops.fused_linear, make, theirs, **bound)


# --------------------------------------------------------------------------------------------- attention


def prefill(batch: int, heads: int, length: int, dim: int) -> Work:
    """Causal attention; the half of the products that the mask leaves counts."""

    def make() -> Arguments:
        q, k, v = (random(batch, length, heads, dim).transpose(1, 2) for _ in range(3))
        return q, k, v, dim**-0.5, True

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *_: object) -> object:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return Work(
        f"causal attention, {batch} x {heads} x {length} x {dim}", ops.attention, make, theirs,
        flops=2 * batch * heads * length * length * dim, marks=(0.60, 0.75, 0.82),
    )  # fmt: skip


def decode(batch: int, heads: int, kv_heads: int, length: int, dim: int) -> Work:
    """One query on a long cache: keys and values are read once."""

    def make() -> Arguments:
        q = random(batch, heads, 1, dim)
        k, v = (random(batch, kv_heads, length, dim) for _ in range(2))
        return q, k, v, dim**-0.5

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> object:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=heads != kv_heads)

    return Work(
        f"decode attention, {batch} x {heads}:{kv_heads} x {length} x {dim}", ops.attention, make, theirs,
        nbytes=4 * batch * kv_heads * length * dim, marks=(0.85, 0.93, 1.0),
    )  # fmt: skip


WORKS = (  # the most telling first: a run may be cut short
    gemv(1, 14336, 4096),
    fused(1, 14336, 4096, gated=True),
    fused(1, 4096, 14336, gated=False),
    gemv_int8(14336, 4096),
    decode(8, 32, 8, 32768, 128),
    prefill(1, 32, 8192, 128),
    norm(16384, 4096),
    fused(4096, 14336, 4096, gated=True),
    fused(4096, 4096, 4096, gated=False),
    decode(1, 32, 8, 65536, 128),
    gemv(1, 4096, 4096),
    gemv(8, 14336, 4096),
    gemv_int8(4096, 4096),
    prefill(4, 16, 4096, 64),
    norm(16384, 8192),
    norm(65536, 1024),
    gemv(1, 128256, 2048),
    fused(64, 14336, 4096, gated=True),
)


def measure(work: Work, ceilings: tuple[float, float]) -> dict[str, object]:
    """One row: checked, then timed."""
    first = work.make()
    name, launch = kernel_for(work.op, first, KERNELS, target_of(torch.device("cuda")))
    wrong = check(work, launch, first)
    if wrong is not None:
        return {"work": work.name, "kernel": name, "wrong": wrong}
    size = sum(a.numel() * a.element_size() for a in first if isinstance(a, torch.Tensor))
    sets = [first, *(work.make() for _ in range(rotations(size) - 1))]

    def calls(function: Callable[..., object]) -> list[Call]:
        return [lambda s=s: function(*s) for s in sets]

    turned: Turned = compare(calls(work.theirs), calls(launch))
    rate, ceiling = (
        (work.nbytes / turned.b, ceilings[0]) if work.nbytes else (work.flops / turned.b, ceilings[1])
    )
    share = rate / ceiling
    met = next(
        (
            word
            for word, mark in zip(("reach", "goal", "bar"), work.marks[::-1], strict=True)
            if share >= mark
        ),
        "",
    )
    return {
        "work": work.name,
        "kernel": name,
        "microseconds": round(turned.b * 1e6, 2),
        "torch": round(turned.a * 1e6, 2),
        "speedup": round(turned.ratio, 3),
        "share": round(share, 3),
        "of": "bandwidth" if work.nbytes else "peak",
        "marks": work.marks,
        "met": met,
    }


def check(work: Work, launch: Callable[..., object], arguments: Arguments) -> str | None:
    """What is wrong with a kernel's result on these arguments; None where nothing is."""
    small = work.flops < 1e11  # beyond, fp64 takes seconds, and fp32 by torch's best is as good an oracle
    oracle, dtype = (work.op.reference, torch.float64) if small else (work.theirs, torch.float32)
    expected = _cast(oracle(*(_cast(a, dtype) for a in arguments)), torch.float64)
    eager = oracle(*arguments)
    verdict = judge(expected, eager, launch(*arguments), BF16)
    return None if verdict.ok else verdict.reason


def _cast(value: object, dtype: torch.dtype) -> object:
    """A floating tensor, or those of a tuple, in another dtype; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def main() -> None:
    """Measure row by row; `gpu_kernels.json` grows with each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--seconds", type=float, default=240.0, help="start no row after that")
    given = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    ceilings = copy_bandwidth(), matrix_peak()
    head = {"copy": round(ceilings[0] / 1e9), "product": round(ceilings[1] / 1e12)}
    print(head, flush=True)
    rows: list[dict[str, object]] = []
    for work in WORKS:
        if time.monotonic() - start > given.seconds:
            print(f"no time for {work.name}")
            continue
        try:
            row = measure(work, ceilings)
        except Exception as error:  # the other rows are worth as much
            row = {"work": work.name, "error": record.told(error)}
        rows.append(row)
        print(row, flush=True)
        record.write("gpu_kernels", {"ceilings": head, "rows": rows}, given.folder)
        torch.cuda.empty_cache()
    if any(r.get("kernel") == REFERENCE or "wrong" in r or "error" in r for r in rows):
        raise SystemExit("some rows failed")


if __name__ == "__main__":
    main()
