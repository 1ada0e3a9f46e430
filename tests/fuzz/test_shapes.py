"""Sizes and layouts: heads, kv heads, head sizes, lengths from 0 on, strides, fixed and symbolic sizes.

The programs read every size off their inputs, so that one compiled graph serves several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt import backend
from graphopt.accuracy import judge, raise_to_fp64
from graphopt.capture import capture
from tests.fuzz.verdict import check
from tests.rewriting import outputs

LAYOUTS = ("plain", "transposed", "sliced", "expanded", "offset", "reversed")


pytestmark = pytest.mark.usefixtures("fresh")


def laid_out(shape: Sequence[int], layout: str, seed: int) -> Tensor:
    """Normal numbers of a shape, in memory as views leave them."""
    random = torch.Generator().manual_seed(seed)
    new = lambda *sizes: torch.randn(sizes, generator=random)
    *lead, last = shape
    if layout == "transposed":
        return new(*lead[:-1], last, lead[-1]).mT
    if layout == "sliced":
        return new(*lead, 2 * last + 1)[..., 1::2][..., :last]
    if layout == "expanded":
        return new(1, *lead[1:], last).expand(*shape)
    if layout == "offset":
        return new(*lead, last + 3)[..., 3:]
    if layout == "reversed":
        return new(*reversed(shape)).permute(*reversed(range(len(shape))))
    return new(*shape)


# ------------------------------------------------------------------------------------------------ programs


@dataclass(frozen=True)
class Sizes:
    """What a draw decides; `groups` query heads share a kv head."""

    batch: int
    kv_heads: int
    groups: int
    queries: int
    past: int
    half: int
    layouts: tuple[str, ...] = ("plain",) * 4

    @property
    def width(self) -> int:
        """The head's size: even, for the rope."""
        return 2 * self.half

    def tensor(self, i: int, *shape: int) -> Tensor:
        """The i-th input."""
        return laid_out(shape, self.layouts[i % len(self.layouts)], i)


class Spelled(nn.Module):
    """softmax(q k^T / sqrt(d), padded and causal) v, kv heads repeated, heads joined

    How often they are repeated is an attribute, as in models: what is computed from two symbolic numbers of
    heads is no factor of either.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.groups = sizes.groups

    def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """q, k, v and which keys are hidden"""
        batch, _, queries, width = q.shape
        _, kv_heads, keys, _ = k.shape
        k, v = (
            x[:, :, None]
            .expand(batch, kv_heads, self.groups, keys, width)
            .reshape(batch, kv_heads * self.groups, keys, width)
            for x in (k, v)
        )
        scores = q @ k.transpose(2, 3) * width**-0.5
        late = torch.arange(keys) > torch.arange(queries)[:, None] + (keys - queries)
        scores = scores.masked_fill(hidden[:, None, None, :] | late, torch.finfo(q.dtype).min)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def fused(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """torch's operator with groups and a boolean mask"""
    seen = ~hidden[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2).flatten(2)


def attention_inputs(s: Sizes) -> tuple[Tensor, ...]:
    """q, k, v and which keys are hidden: never the first."""
    keys = s.past + s.queries
    shape = s.batch, s.kv_heads, keys, s.width
    hidden = torch.rand(s.batch, keys, generator=torch.Generator().manual_seed(9)) < 0.3
    hidden[:, :1] = False
    q = s.tensor(0, s.batch, s.kv_heads * s.groups, s.queries, s.width)
    return q, s.tensor(1, *shape), s.tensor(2, *shape), hidden


class Rope(nn.Module):
    """Halves turned, in q and in k with its fewer heads; both are parts of one tensor, so of one batch"""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.kv_heads = sizes.kv_heads

    def forward(self, qk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """k's heads are the first"""
        q, k, c, s = qk[:, self.kv_heads :], qk[:, : self.kv_heads], cos[:, None], sin[:, None]
        turn = lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
        return q * c + turn(q) * s, k * c + turn(k) * s


def rope_inputs(s: Sizes) -> tuple[Tensor, ...]:
    """q and k in one, and tables of one row for all batches."""
    qk = s.tensor(0, s.batch, s.kv_heads * (s.groups + 1), s.queries, s.width)
    return qk, *(s.tensor(i, 1, s.queries, s.width) for i in (1, 2))


def norms(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A residual, an RMS norm, and a layer norm of it"""
    total = x + y
    h = w * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-2))
    return F.layer_norm(h + x, (x.shape[-1],), w, b, 1e-2), total


def norm_inputs(s: Sizes) -> tuple[Tensor, ...]:
    """Two hidden states and two rows."""
    shape = s.batch, s.queries, s.width
    return s.tensor(0, *shape), s.tensor(1, *shape), *(s.tensor(i, 1, s.width)[0] for i in (2, 3))


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A gated MLP and its residual"""
    return x + (F.silu(x @ gate.t()) * F.linear(x, up)) @ down.t()


def mlp_inputs(s: Sizes) -> tuple[Tensor, ...]:
    """Hidden states and three weights, which are inputs here."""
    inner = s.kv_heads * s.groups + 1
    x = s.tensor(0, s.batch, s.queries, s.width)
    return x, s.tensor(1, inner, s.width), s.tensor(2, inner, s.width), s.tensor(3, s.width, inner)


@dataclass(frozen=True)
class Family:
    """Programs of one kind: the program for some sizes, its inputs, and what it has to become."""

    program: Callable[[Sizes], Callable[..., object]]
    inputs: Callable[[Sizes], tuple[Tensor, ...]]
    ops: frozenset[str]


FAMILIES = {
    "spelled attention": Family(Spelled, attention_inputs, frozenset({"attention"})),
    "fused attention": Family(lambda s: fused, attention_inputs, frozenset({"attention"})),
    "rope": Family(Rope, rope_inputs, frozenset({"rope"})),
    "norms": Family(lambda s: norms, norm_inputs, frozenset({"add_rms_norm", "add_layer_norm"})),
    "mlp": Family(lambda s: mlp, mlp_inputs, frozenset({"gated_activation", "linear"})),
}
# Every size from the smallest on: no batch, no queries, one of each.
ANY = st.builds(
    Sizes,
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(0, 5),
    past=st.integers(0, 4),
    half=st.integers(1, 5),
    layouts=st.tuples(*(st.sampled_from(LAYOUTS) for _ in range(4))),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_size_and_layout_is_right(name: str) -> None:
    family, seen = FAMILIES[name], Counter[str]()

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ANY)
    def check_one(sizes: Sizes) -> None:
        seen.update(set(check(family.program(sizes), family.inputs(sizes), torch.float32)))

    check_one()
    assert all(seen[op] >= 12 for op in family.ops), seen


# How many heads, kv heads a group and what layouts: they stay in a model, while batch and lengths change.
MODELS = (
    Sizes(3, 1, 3, 4, 2, 3),
    Sizes(2, 3, 2, 5, 4, 4, ("expanded", "transposed", "plain", "sliced")),
)
OTHERS = ((2, 5, 3), (1, 1, 6), (2, 0, 4), (0, 3, 1))  # batch, queries, past


@pytest.mark.parametrize("model", MODELS, ids=lambda s: f"{s.kv_heads}x{s.groups} heads, {s.layouts[0]}")
@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_of_symbolic_sizes_is_right_at_others(name: str, model: Sizes) -> None:
    """The second call makes batch and lengths symbolic; Dynamo makes another graph for sizes 0 and 1."""
    family = FAMILIES[name]
    program = family.program(model)
    compiled = torch.compile(program, backend="graphopt", options={"strict": True})
    for batch, queries, past in ((model.batch, model.queries, model.past), *OTHERS):
        inputs = family.inputs(replace(model, batch=batch, queries=queries, past=past))
        oracle = raise_to_fp64(capture(program, *inputs).gm)(*inputs)
        eager, ours = program(*inputs), compiled(*inputs)
        verdict = judge(list(oracle), outputs(eager), outputs(ours), torch.float32)
        assert verdict.ok, f"batch {batch}, {queries} queries, {past} past: {verdict.reason}"
    found = [{op for op in family.ops if r.counts.get(op)} for r in backend.reports()]
    assert found[:2] == [family.ops, family.ops], backend.reports()[:2]
