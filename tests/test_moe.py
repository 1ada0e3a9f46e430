"""Mixtures of experts on the whole road: each way to write one becomes one op, which other passes bear."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt import backend, defaults, ops
from graphopt import graph as g
from graphopt.accuracy import judge, raise_to_fp64
from graphopt.kernels import experts as kernels
from graphopt.options import Options
from graphopt.passes.quantize import Quantize
from graphopt.pipeline import Pipeline
from tests.rewriting import vocabulary

TOKENS, CHOSEN, EXPERTS, WIDTH, INNER = 7, 2, 4, 24, 16  # grouped_mm takes rows of 16 bytes only
Forward = Callable[["Experts", Tensor, Tensor, Tensor], Tensor]


def grouped(self: Experts, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Rows sorted by expert, one grouped product for all."""
    chosen = ids.shape[1]
    sorted_ids, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(sorted_ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    h = F.grouped_mm(x[order // chosen], self.gate_up.transpose(1, 2), offs=ends)
    h = self.between(h + self.gate_up_bias[sorted_ids])
    y = F.grouped_mm(h, self.down.transpose(1, 2), offs=ends) + self.down_bias[sorted_ids]
    y = y * routing.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(x.shape[0], chosen, -1).sum(1).to(x.dtype)


def masked(self: Experts, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """As the grouped one, rows masked whose experts another rank holds: none, ids choose among all."""
    chosen = ids.shape[1]
    sorted_ids, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(sorted_ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    elsewhere = (sorted_ids >= EXPERTS).unsqueeze(-1)
    sorted_ids.clamp_(max=EXPERTS - 1)
    rows = x[order // chosen].masked_fill_(elsewhere, 0.0)
    h = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends) + self.gate_up_bias[sorted_ids]
    h = self.between(h.masked_fill(elsewhere, 0.0))
    y = F.grouped_mm(h, self.down.transpose(1, 2), offs=ends) + self.down_bias[sorted_ids]
    y = y.masked_fill(elsewhere, 0.0) * routing.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return y[back].view(x.shape[0], chosen, -1).sum(1).to(x.dtype)


def batched(self: Experts, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """A copy of an expert's matrices for each row."""
    chosen, flat = ids.shape[1], ids.reshape(-1)
    rows = x.repeat_interleave(chosen, 0)
    h = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1) + self.gate_up_bias[flat]
    y = torch.bmm(self.down[flat], self.between(h).unsqueeze(-1)).squeeze(-1) + self.down_bias[flat]
    return (y * routing.reshape(-1, 1)).view(x.shape[0], chosen, -1).sum(1).to(x.dtype)


def normed(self: Experts, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """As the batched one, each expert's answer normalised: what no `experts` says."""
    chosen, flat = ids.shape[1], ids.reshape(-1)
    rows = x.repeat_interleave(chosen, 0)
    h = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1) + self.gate_up_bias[flat]
    y = torch.bmm(self.down[flat], self.between(h).unsqueeze(-1)).squeeze(-1) + self.down_bias[flat]
    y = F.rms_norm(y, (WIDTH,), None, 1e-6)
    return (y * routing.reshape(-1, 1)).view(x.shape[0], chosen, -1).sum(1).to(x.dtype)


def scaled(self: Experts, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Llama 4's: all rows through all experts, scaled on the way in, to nothing where it was not chosen."""
    scores = torch.full((x.shape[0], EXPERTS), float("-inf"), dtype=x.dtype).scatter_(
        1, ids, routing.logit().to(x.dtype)
    )
    scores = torch.sigmoid(scores.float()).to(x.dtype)
    rows = x.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)
    h = torch.bmm(rows.view(EXPERTS, -1, x.shape[-1]), self.gate_up.transpose(1, 2))
    y = torch.bmm(self.between(h), self.down.transpose(1, 2)).view(-1, x.shape[-1])
    return y.reshape(EXPERTS, -1, y.shape[-1]).sum(dim=0)


class Experts(nn.Module):
    """Experts on stacked weights, written as `forward_of` says."""

    def __init__(self, forward_of: Forward) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) * WIDTH**-0.5)
        self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * INNER**-0.5)
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.forward_of = forward_of

    def between(self, h: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        """[T, H] -> [T, H]"""
        return self.forward_of(self, x, ids, routing)


class Block(nn.Module):
    """A router, its experts, and a shared expert."""

    def __init__(self, forward_of: Forward) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts(forward_of)
        self.gate, self.up, self.down = (nn.Linear(*s) for s in ((WIDTH, 12), (WIDTH, 12), (12, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]"""
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = torch.topk(torch.softmax(self.router(rows).float(), -1), CHOSEN, -1)
        routed = self.experts(rows, ids, weights / weights.sum(-1, keepdim=True))
        return x + routed.view(x.shape) + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(5)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def seen(model: nn.Module, *args: Tensor, **options: object) -> tuple[object, graphopt.Report]:
    """The recognised graph and its report."""
    program = graphopt.capture(model, *args)
    made = Options(**options)  # type: ignore[arg-type]
    return defaults.pipeline(made, until="recognise").run(program, defaults.context(made))


@pytest.mark.parametrize(
    ("forward_of", "dtype"),
    [
        (grouped, torch.bfloat16),
        (masked, torch.bfloat16),
        (batched, torch.bfloat16),
        (batched, torch.float32),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_block_becomes_one_op(forward_of: Forward, dtype: torch.dtype) -> None:
    """Whatever way it is written: one `experts`, the shared expert a gated MLP, the router a linear."""
    model, x = Block(forward_of).eval().to(dtype), torch.randn(1, TOKENS, WIDTH).to(dtype)
    out, report = seen(model, x)
    names = vocabulary(out.gm)  # type: ignore[attr-defined]
    assert names.count("experts") == 1 and "expert_matmul" not in names
    assert names.count("gated_activation") == 1 and names.count("linear") == 4
    found = torch.compile(model, backend="graphopt", options={"strict": True})(x)
    exact = Block(forward_of).eval()
    exact.load_state_dict(model.state_dict())
    oracle = routed_oracle(exact.double(), model, x)
    assert judge(oracle, model(x), found, dtype).ok
    assert not judge(oracle, model(x), found + x * 0.1, dtype).ok  # the check can fail
    assert report.counts["experts"] == 1


def routed_oracle(exact: Block, model: Block, x: Tensor) -> Tensor:
    """The block in fp64, on the experts that the model itself chooses."""
    rows = x.reshape(-1, WIDTH)
    scores = torch.softmax(model.router(rows).float(), -1)
    ids = torch.topk(scores, CHOSEN, -1)[1]
    wide = rows.double()
    shares = torch.softmax(exact.router(wide), -1).gather(-1, ids)
    e = exact.experts
    routed = ops.experts.reference(
        wide, ids, shares / shares.sum(-1, keepdim=True), e.gate_up, e.down, "silu", True, False,
        e.gate_up_bias, e.down_bias,
    )  # fmt: skip
    shared = exact.down(F.silu(exact.gate(wide)) * exact.up(wide))
    return (wide + routed + shared).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [TOKENS, 1])
def test_a_block_that_scales_its_input_becomes_one_op(dtype: torch.dtype, tokens: int) -> None:
    """Each row is given only to the experts that it chose: f(0) is 0, as no bias is added."""
    model, x = Block(scaled).eval().to(dtype), torch.randn(1, tokens, WIDTH).to(dtype)
    out, _ = seen(model, x)
    graph = out.gm.graph  # type: ignore[attr-defined]  # known to be there
    (node,) = (n for n in graph.nodes if g.is_call(n, ops.experts.overload))
    assert g.arg(node, "scale_input") and g.arg(node, "ids") is not None
    assert "expert_matmul" not in vocabulary(out.gm)  # type: ignore[attr-defined]  # known to be there
    compiled = torch.compile(model, backend="graphopt", options={"strict": True, "verify": "always"})
    found, program = compiled(x), graphopt.capture(model, x)
    (exact,) = raise_to_fp64(program.gm)(*program.bind((x,), {}))
    assert judge(exact, model(x), found, dtype).ok
    checked = backend.reports()[-1].verification
    assert checked is not None and not checked.taken_back and not checked.not_verified


def test_a_norm_between_leaves_the_rows_experts() -> None:
    model, x = Block(normed).eval(), torch.randn(1, TOKENS, WIDTH)
    out, _ = seen(model, x)
    names = vocabulary(out.gm)  # type: ignore[attr-defined]
    assert names.count("experts") == 1 and names.count("rms_norm") == 1
    found = torch.compile(model, backend="graphopt", options={"strict": True})(x)
    torch.testing.assert_close(found, model(x))


def test_sizes_may_be_symbols() -> None:
    """One compilation serves every number of tokens, with the same matches."""
    model = Block(batched).eval()
    compiled = torch.compile(model, backend="graphopt", dynamic=True, options={"strict": True})
    for tokens in (7, 5, 12):
        x = torch.randn(2, tokens, WIDTH)
        torch.testing.assert_close(compiled(x), model(x))


def test_the_router_keeps_its_weights_and_the_rest_is_packed() -> None:
    """Quantization: the router is kept, the shared expert's linears go, the experts stay as they are."""
    model, x = Block(batched).eval(), torch.randn(1, TOKENS, WIDTH)
    program = graphopt.capture(model, x)
    road = Pipeline((*defaults.pipeline(until="merge").passes, Quantize(group=4, least=1)))
    out, _ = road.run(program, defaults.context())
    names = vocabulary(out.gm)
    assert names.count("experts") == 1 and names.count("linear") == 1 and names.count("linear_int8") >= 2


def test_a_gpu_target_falls_back_on_the_reference_and_says_so() -> None:
    model, x = Block(batched).eval(), torch.randn(1, TOKENS, WIDTH)
    options = Options(target="cuda:90")
    _, report = defaults.pipeline(options).run(graphopt.capture(model, x), defaults.context(options))
    assert "reference" in str(report) and "experts" in str(report)


def test_ids_outside_add_nothing() -> None:
    """Where experts live on other ranks: the kernel and the reference leave those rows at zero."""
    x, routing = torch.randn(3, WIDTH), torch.rand(3, 2)
    ids = torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [1, 1]])
    e = Experts(batched)
    for function in (ops.experts.reference, kernels.experts):
        y = function(x, ids, routing, e.gate_up, e.down, "silu")
        assert not y[1].any() and y[0].any() and y[2].any()
        alone = function(x[:1], ids[:1, :1], routing[:1, :1], e.gate_up, e.down, "silu")
        torch.testing.assert_close(y[:1], alone)


def test_a_grouped_product_has_an_fp64_form() -> None:
    """torch's operator takes no fp64, so that its oracle is a loop; rows after the last group are zero."""
    x, w = torch.randn(5, 16).bfloat16(), torch.randn(2, 16, 8).bfloat16()
    ends = torch.tensor([2, 4], dtype=torch.int32)
    program = graphopt.capture(lambda x, w, ends: F.grouped_mm(x, w, offs=ends), x, w, ends)
    (found,) = raise_to_fp64(program.gm)(x, w, ends)
    expected = torch.cat((x[:2].double() @ w[0].double(), x[2:4].double() @ w[1].double(), torch.zeros(1, 8)))
    torch.testing.assert_close(found, expected)
