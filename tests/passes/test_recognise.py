"""The pass that recognises: rules, then masks, on a whole layer, alike in every dtype; fuel and deny."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import graph as g
from graphopt.capture import capture
from graphopt.defaults import RULES, context
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Context
from tests.rewriting import Watch, canonical, vocabulary
from tests.tolerances import LAYER


class Layer(nn.Module):
    """A decoder layer: q and k normed and roped, grouped kv heads, a causal padded mask, a gated MLP."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.kv, self.dim, width = 4, 2, 6, 20
        linear = lambda n, m: nn.Linear(n, m, bias=False, dtype=dtype)
        self.q, self.k, self.v = linear(width, 24), linear(width, 12), linear(width, 12)
        self.o, self.gate, self.up, self.down = (
            linear(24, width),
            linear(width, 14),
            linear(width, 14),
            linear(14, width),
        )
        self.first, self.second = (nn.Parameter(torch.rand(width, dtype=dtype) + 0.5) for _ in range(2))
        self.q_scale, self.k_scale = (nn.Parameter(torch.rand(6, dtype=dtype) + 0.5) for _ in range(2))

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        """Llama's norm."""
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * h.to(x.dtype)

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Half-split rope."""
        half = x.shape[-1] // 2
        return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, padding: Tensor) -> Tensor:
        """x [batch, length, 20], padding [batch, length] (1 where a token stands)."""
        batch, length, _ = x.shape
        h = self.norm(x, self.first)
        q, k, v = (p(h).view(batch, length, -1, self.dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.norm(q, self.q_scale), self.norm(k, self.k_scale)
        q, k = self.turned(q, cos, sin), self.turned(k, cos, sin)
        k, v = (
            t[:, :, None]
            .expand(batch, self.kv, 2, length, self.dim)
            .reshape(batch, self.heads, length, self.dim)
            for t in (k, v)
        )
        causal = torch.arange(length)[None, :] <= torch.arange(length)[:, None]
        seen = causal[None, None] & padding[:, None, None, :].bool()
        scores = torch.matmul(q, k.transpose(2, 3)) * self.dim**-0.5
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, -1))
        h = self.norm(x, self.second)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def example(dtype: torch.dtype, batch: int = 3, length: int = 5) -> tuple[Layer, tuple[Tensor, ...]]:
    """A layer and its inputs, one row left-padded."""
    torch.manual_seed(0)
    layer = Layer(dtype)
    angle = torch.rand(1, length, 3).repeat(1, 1, 2)
    padding = torch.ones(batch, length, dtype=torch.long)
    padding[0, : length // 2] = 0
    return layer, (
        torch.randn(batch, length, 20).to(dtype),
        angle.cos().to(dtype),
        angle.sin().to(dtype),
        padding,
    )


def recognised(layer: nn.Module, inputs: tuple[Tensor, ...], ctx: Context) -> tuple[fx.GraphModule, object]:
    """The graph after the pass, and its results."""
    captured = capture(layer, *inputs)
    canonicalize(captured.gm)
    Recognise().run(captured.gm, ctx)
    captured.gm.graph.lint()
    return captured.gm, captured(*inputs)


COUNTS = {"rms_norm": 3, "add_rms_norm": 1, "rope": 1, "attention": 1, "gated_activation": 1, "linear": 7}


@pytest.mark.parametrize(("batch", "length"), [(3, 5), (1, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_layer_is_recognised_completely(dtype: torch.dtype, batch: int, length: int) -> None:
    """The same counts in every dtype and for batch and length 1; nothing of softmax or norms is left."""
    layer, inputs = example(dtype, batch, length)
    with torch.no_grad():
        gm, found = recognised(layer, inputs, context())
        expected = layer(*inputs)
    ours = Counter(g.op_name(n) for n in gm.graph.nodes if g.is_call(n) and g.is_ours(n.target))
    assert ours == COUNTS
    left = {
        g.op_name(n) for n in gm.graph.nodes if g.is_call(n) and g.is_tensor(n) and not g.is_ours(n.target)
    }
    assert not left & {
        "aten.softmax",
        "aten.matmul",
        "aten.rsqrt",
        "aten.pow",
        "aten.mul",
        "aten.masked_fill",
    }
    assert isinstance(found, Tensor)
    if dtype == torch.float64:  # its cast to fp32 makes the lowest number -inf: a row without keys is nan
        found, expected = found.nan_to_num()[~expected.isnan()], expected[~expected.isnan()]
    precise = dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(found, expected, **LAYER[precise])


def test_the_mask_becomes_arguments() -> None:
    """Causal and key padding are read off the mask; nothing is left of it as a bias."""
    layer, inputs = example(torch.float32)
    gm, _ = recognised(layer, inputs, context())
    (node,) = [n for n in gm.graph.nodes if g.op_name(n) == "attention"]
    assert g.arg(node, "causal") is True and g.arg(node, "bias") is None
    assert g.arg(node, "key_padding") is not None and g.arg(node, "empty_rows_mean") is True


def test_fuel_is_what_is_left_for_the_next_pass() -> None:
    """Each match of a rule takes one."""
    layer, inputs = example(torch.float32)
    watch, ctx = Watch(), context(observers=())
    ctx.observers = (watch,)
    ctx.fuel = 100
    recognised(layer, inputs, ctx)
    assert ctx.fuel == 100 - sum(m.rule != "mask" for m in watch.matches)


def test_a_denied_mask_stays_a_bias() -> None:
    """A mask's reading has an id like any match."""
    layer, inputs = example(torch.float32)
    watch, ctx = Watch(), context()
    ctx.observers = (watch,)
    recognised(layer, inputs, ctx)
    (identity,) = [m.id for m in watch.matches if m.rule == "mask"]
    ctx = context()
    ctx.deny = frozenset({identity})
    gm, found = recognised(layer, inputs, ctx)
    (node,) = [n for n in gm.graph.nodes if g.op_name(n) == "attention"]
    assert g.arg(node, "bias") is not None and not g.arg(node, "causal")
    torch.testing.assert_close(found, layer(*inputs))


def _attended(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention whose scores go through `mask`."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.mT * 0.5 / 20.0) * 20.0
        return torch.softmax(mask(scores), -1) @ v

    return program


HIDDEN = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.5
HIDDEN[0, 0, 1] = True  # a row without a key
LEFT_OVER: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a fill that scores may reach": (lambda s: s.masked_fill(HIDDEN, -1e4), "aten.masked_fill"),
    "a sum with a number": (lambda s: s + 1.0, "aten.add"),
    "a mask, then a sum": (lambda s: s.masked_fill(HIDDEN, -torch.inf) + 1.0, "aten.add"),
    "the lowest number, then a division": (
        lambda s: s.masked_fill(HIDDEN, torch.finfo(s.dtype).min) / torch.arange(1.0, 6.0),
        "aten.div",
    ),
    "a bias, then a sum": (lambda s: s + torch.arange(20.0).reshape(4, 5) + 1.0, "aten.add"),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_scores_that_became_no_attention_go_back(case: str) -> None:
    """No half-way op is left; the numbers are eager's, and the refusal names the scores' reader."""
    mask, reader = LEFT_OVER[case]
    random = torch.Generator().manual_seed(1)
    args = tuple(torch.randn(2, 3, n, 8, generator=random) for n in (4, 5, 5))
    program = _attended(mask)
    before = canonical(program, *args)
    after, watch = fx.GraphModule(before, g.copy_graph(before.graph)), Watch()
    ctx = context()
    ctx.observers = (watch,)
    Recognise().run(after, ctx)
    after.graph.lint()
    assert vocabulary(after) == []
    torch.testing.assert_close(after(*args)[0], before(*args)[0], equal_nan=True)
    for node in after.graph.nodes:
        assert node.op == "output" or g.val(node) is not None, node
    products = [n for n in after.graph.nodes if g.op_name(n) == "aten.matmul"]
    assert products
    assert any(g.origin(n) is not None for n in products)
    (reason,) = [r.reason for r in watch.refusals if r.rule == "attention_scores"]
    assert reason.startswith(f"no attention: the scores are read by {reader} (")
    once = g.fingerprint(after.graph)
    Recognise().run(after, context())
    assert g.fingerprint(after.graph) == once


LOWEST = torch.finfo(torch.float32).min
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where(seen, scores, lowest)": lambda s, m: torch.where(~m, s, LOWEST),
    "where(seen, scores, -inf)": lambda s, m: torch.where(~m, s, float("-inf")),
    "where(seen, scores, full([], lowest))": lambda s, m: torch.where(~m, s, torch.full([], LOWEST)),
    "where(seen, scores, full_like)": lambda s, m: torch.where(~m, s, torch.full([1, 1, 4, 5], LOWEST)),
    "where(seen, scores, -1e9)": lambda s, m: torch.where(~m, s, -1e9),
    "where(hidden, lowest, scores)": lambda s, m: torch.where(m, LOWEST, s),
    "where(hidden, -1e9, scores)": lambda s, m: torch.where(m, -1e9, s),
    "masked_fill(-1e9)": lambda s, m: s.masked_fill(m, -1e9),
    "masked_fill(-1e30)": lambda s, m: s.masked_fill(m, -1e30),
    "masked_fill(lowest)": lambda s, m: s.masked_fill(m, LOWEST),
    "masked_fill(-inf)": lambda s, m: s.masked_fill(m, float("-inf")),
    "added": lambda s, m: s + torch.zeros(()).masked_fill(m, LOWEST),
}


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("spelling", MASKS)
def test_masks_of_every_spelling_and_rank(spelling: str, rank: int) -> None:
    """[s, t], [h, s, t] and [b, 1, s, t] masks become the attention's; rows without a key stay eager's."""
    random = torch.Generator().manual_seed(2)
    args = tuple(torch.randn(2, 3, n, 8, generator=random) for n in (4, 5, 5))
    hidden = (
        HIDDEN.expand(2, 3, 4, 5)[0, 0] if rank == 2 else HIDDEN[0].expand(3, 4, 5) if rank == 3 else HIDDEN
    )
    program = lambda q, k, v, m: torch.softmax(MASKS[spelling](q @ k.mT * 0.5, m), -1) @ v
    gm = canonical(program, *args, hidden)
    Recognise().run(gm, context())
    gm.graph.lint()
    assert vocabulary(gm) == ["attention"]
    want, have = program(*args, hidden), gm(*args, hidden)[0]
    rows = ~want.isnan()  # eager's rows without a key under -inf
    assert rows.all() or "-inf" in spelling
    torch.testing.assert_close(have[rows], want[rows])


def test_a_fill_that_scores_may_reach_is_refused() -> None:
    """The reason names the value and the limit."""
    args = tuple(torch.randn(2, 3, n, 8) for n in (4, 5, 5))
    for fill, reason in (
        (-1e4, "the fill -10000.0 > -1000000000.0: a score may be as low"),
        (-5.0, "-5.0 > "),
    ):
        program = lambda q, k, v, fill=fill: torch.softmax((q @ k.mT).masked_fill(HIDDEN[:1], fill), -1) @ v
        watch, ctx = Watch(), context()
        ctx.observers = (watch,)
        gm = canonical(program, *args)
        Recognise().run(gm, ctx)
        assert vocabulary(gm) == []
        assert any(reason in r.reason for r in watch.refusals if r.rule == "low_filled_weights")
        torch.testing.assert_close(gm(*args)[0], program(*args))


def test_a_graph_without_a_transformer_is_left_alone() -> None:
    """No rule fires, nothing changes."""
    gm = capture(lambda x: x.cumsum(-1).sort(-1).values, torch.randn(3, 4)).gm
    canonicalize(gm)
    before = g.fingerprint(gm.graph)
    Recognise().run(gm, context())
    assert g.fingerprint(gm.graph) == before


def test_the_pass_is_a_plain_value() -> None:
    """It compares and prints; the rules come from the context."""
    assert Recognise() == Recognise() and str(Recognise()) == "Recognise()"
    assert context().rules is RULES
