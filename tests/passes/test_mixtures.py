"""Lists of experts become one op, rows skip experts without a share; all else stays and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import graphopt
from graphopt import backend, defaults, ops
from graphopt import graph as g
from graphopt.accuracy import judge, raise_to_fp64
from graphopt.options import Options
from graphopt.passes.canonicalize import canonicalize
from graphopt.passes.recognise import Recognise
from graphopt.pipeline import Context
from tests.expert_lists import (
    CHOSEN,
    EXPERTS,
    INNER,
    SOFT,
    SUMS,
    WIDTH,
    Mixture,
    columns,
    index_add,
    masked_sums,
    mixtures,
    put_back,
)
from tests.mutations import mutants, read_outside
from tests.rewriting import Watch, vocabulary
from tests.tolerances import EXPERTS_SUMMED, IN_FP64, INNER_VALUES, ROUTER

EXPERTS_OP = ops.experts.overload
by_mixture = pytest.mark.parametrize(
    ("name", "make"), list(mixtures()), ids=lambda x: x if isinstance(x, str) else ""
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(3)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def recognised(gm: fx.GraphModule, **context: object) -> tuple[fx.GraphModule, Watch]:
    """A copy of a canonical graph after the pass, and what was told."""
    copy, watch = fx.GraphModule(gm, g.copy_graph(gm.graph)), Watch()
    copy.meta.update(gm.meta)
    Recognise().run(copy, Context(rules=defaults.RULES, observers=(watch,), **context))  # type: ignore[arg-type]  # options of the call
    copy.graph.lint()
    copy.recompile()
    return copy, watch


def canonical(model: nn.Module, *args: Tensor) -> tuple[fx.GraphModule, list[object]]:
    """A model's canonical graph, and the values that it runs on."""
    program = graphopt.capture(model, *args)
    canonicalize(program.gm)
    return program.gm, list(program.bind(args, {}))


def the_experts(gm: fx.GraphModule) -> fx.Node:
    (node,) = (n for n in gm.graph.nodes if g.is_call(n, EXPERTS_OP))
    return node


# ------------------------------------------------------------------------------------------------- it does


@by_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_list_becomes_one_op(name: str, make: Callable[[], Mixture], dtype: torch.dtype) -> None:
    """Whatever way the sum is written: one op, the router's linear, and the numbers of the list."""
    model, x = make().eval().to(dtype), torch.randn(2, 5, WIDTH).to(dtype)
    gm, values = canonical(model, x)
    exact = raise_to_fp64(gm)(*values)
    after, watch = recognised(gm)
    names = vocabulary(after)
    assert names.count("experts") == 1 and set(names) <= {"experts", "linear"}, watch.refusals
    assert names.count("linear") <= 2  # the router, where it is asked twice
    assert (g.arg(the_experts(after), "ids") is None) == (make().sum_of in SOFT)
    verdict = judge(exact, gm(*values), after(*values), dtype)
    assert verdict.ok, verdict
    assert not judge(exact, gm(*values), [y + x * 0.1 for y in after(*values)], dtype).ok  # it can fail
    again, more = recognised(after)
    assert not more.matches and g.fingerprint(again.graph) == g.fingerprint(after.graph)


@by_mixture
def test_the_whole_road_runs_it(name: str, make: Callable[[], Mixture]) -> None:
    """To the kernel, verified on the way: every rewrite is run as old and as new."""
    model, x = make().eval(), torch.randn(2, 5, WIDTH)
    program = graphopt.capture(model, x)
    options = Options()
    out, report = defaults.pipeline(options).run(program, defaults.context(options))
    assert report.kernels["experts"] == {"experts_sorted": 1}
    torch.testing.assert_close(out(x), model(x), **EXPERTS_SUMMED)
    assert report.unmatched_share < ROUTER


@pytest.mark.parametrize("sum_of", [columns, masked_sums], ids=lambda f: f.__name__)
def test_sizes_may_be_symbols(sum_of: Callable[..., Tensor]) -> None:
    model = Mixture(sum_of).eval()
    compiled = torch.compile(model, backend="graphopt", dynamic=True, options={"strict": True})
    seen = len(backend.reports())
    for batch, length in ((2, 5), (3, 7), (2, 12)):
        x = torch.randn(batch, length, WIDTH)
        torch.testing.assert_close(compiled(x), model(x), **EXPERTS_SUMMED)
    reports = backend.reports()[seen:]
    assert len(reports) == 1 and reports[0].counts["experts"] == 1


@pytest.mark.parametrize("sum_of", [index_add, put_back], ids=lambda f: f.__name__)
def test_rows_that_are_taken_are_one_graph_where_torch_allows_it(sum_of: Callable[..., Tensor]) -> None:
    """torch's own switch, which is the user's to set; without it Dynamo breaks the graph at each `where`."""
    model, x = Mixture(sum_of).eval(), torch.randn(2, 5, WIDTH)
    seen = len(backend.reports())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, backend="graphopt", options={"strict": True, "verify": "always"})
        torch.testing.assert_close(compiled(x), model(x), **EXPERTS_SUMMED)
    (report,) = backend.reports()[seen:]
    assert report.counts["experts"] == 1 and not report.counts.get("aten.where")
    assert not report.counts.get("aten._assert_scalar")
    checked = report.verification
    assert checked is not None and not checked.taken_back
    torch._dynamo.reset()
    broken = torch.compile(model, backend="graphopt", options={"strict": True})
    torch.testing.assert_close(broken(x), model(x), **EXPERTS_SUMMED)


def test_rows_may_be_cast_by_autocast() -> None:
    """bf16 linears of fp32 rows: the casts of each expert's rows become one."""
    model, x = Mixture(index_add).eval(), torch.randn(2, 5, WIDTH)
    seen = len(backend.reports())
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
    ):
        compiled = torch.compile(model, backend="graphopt", options={"strict": True, "verify": "always"})
        found, eager = compiled(x), model(x)
    (report,) = backend.reports()[seen:]
    assert report.counts["experts"] == 1 and found.dtype == eager.dtype
    assert report.verification is not None and not report.verification.taken_back
    gm, values = canonical(model, x)
    assert judge(raise_to_fp64(gm)(*values)[0], eager, found, torch.bfloat16).ok


def test_a_tensor_parallel_part_of_a_list_adds_nothing_for_others() -> None:
    """More ids than experts, as where the others live on another rank."""

    def part(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        out = x
        for e, expert in enumerate(self.experts[:-1]):
            out = out + ((ids == e) * routing).sum(-1, keepdim=True) * expert(x)
        return out

    model, x = Mixture(part).eval(), torch.randn(2, 5, WIDTH)
    gm, values = canonical(model, x)
    after, _ = recognised(gm)
    assert vocabulary(after).count("experts") == 1
    torch.testing.assert_close(after(*values)[0], model(x), **EXPERTS_SUMMED)


# ------------------------------------------------------------------------------------------- it does not


@pytest.mark.parametrize("sum_of", SUMS, ids=lambda f: f.__name__)
def test_no_mutant_becomes_something_else(sum_of: Callable[..., Tensor]) -> None:
    """Whatever is changed in a list: what the pass makes of it has the numbers of the changed one."""
    model, x = Mixture(sum_of).eval(), torch.randn(1, 4, WIDTH)
    gm, values = canonical(model, x)
    made, changed, compared = vocabulary(recognised(gm)[0]), 0, 0
    takes = [n for n in gm.graph.nodes if g.is_call(n, torch.ops.aten.where.default)]
    last = takes[1] if takes else g.output_node(gm.graph)  # the further experts are as the first one
    for label, mutant in mutants(gm, lambda node: node < last):
        after, _ = recognised(mutant)
        changed += vocabulary(after) != made
        if "experts" not in vocabulary(after):
            continue
        try:
            expected = raise_to_fp64(mutant)(*values)
        except (RuntimeError, ValueError, IndexError):
            continue  # runs on abstract values alone
        if any(not torch.isfinite(y).all() for y in expected):
            continue
        compared += 1
        for want, have in zip(expected, raise_to_fp64(after)(*values), strict=True):
            torch.testing.assert_close(have, want, **IN_FP64, msg=label)
    assert changed > 10 and compared > 10


@pytest.mark.parametrize("sum_of", [index_add, put_back, columns], ids=lambda f: f.__name__)
def test_inner_values_that_are_read_outside_stay(sum_of: Callable[..., Tensor]) -> None:
    model, x = Mixture(sum_of).eval(), torch.randn(1, 4, WIDTH)
    gm, values = canonical(model, x)
    refused = 0
    for _, mutant in read_outside(gm):
        after, watch = recognised(mutant)
        for want, have in zip(mutant(*values), after(*values), strict=True):
            torch.testing.assert_close(have, want, **INNER_VALUES)
        refused += any("is also used by" in r.reason for r in watch.refusals if r.rule == "expert_list")
    assert refused >= 4 * EXPERTS


def same_number_twice(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    gates = torch.softmax(self.router(x), -1)
    return self.experts[0](x) * gates[..., 0:1] + self.experts[1](x) * gates[..., 0:1]


def too_few(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    gates = torch.softmax(self.router(x), -1)
    return self.experts[0](x) * gates[..., 0:1] + self.experts[1](x) * gates[..., 1:2]


def two_inputs(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    gates = torch.softmax(self.router(x), -1)
    return sum(e(x if i else -x) * gates[..., i : i + 1] for i, e in enumerate(self.experts))  # type: ignore[return-value]  # a sum of tensors is one


def other_form(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    gates = torch.softmax(self.router(x), -1)
    first = self.experts[0].down(F.gelu(self.experts[0].gate(x)) * self.experts[0].up(x)) * gates[..., 0:1]  # type: ignore[union-attr, operator]  # modules
    return sum((self.experts[i](x) * gates[..., i : i + 1] for i in range(1, EXPERTS)), first)


def any_ids_put_back(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    return put_back(self, x, (x[..., :CHOSEN] > 0).long(), routing)


def computed_weights(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    gates, out = torch.softmax(self.router(x), -1), x * 0
    for i, e in enumerate(self.experts):
        down = e.down.weight * x.mean()  # type: ignore[union-attr, operator]  # modules
        out = out + F.linear(F.silu(e.gate(x)) * e.up(x), down) * gates[..., i : i + 1]  # type: ignore[operator, union-attr]  # modules
    return out


REFUSED: dict[Callable[..., Tensor], str] = {
    same_number_twice: "its experts are [0, 0], not each of 0 .. 1 once",
    too_few: "3 routing weights for 2 experts",
    two_inputs: "its experts read other rows or other routing weights",
    other_form: "is of an expert of another form than",
    any_ids_put_back: "nothing says that a row chooses an expert once only",
    computed_weights: "does not depend on weights alone",
}


@pytest.mark.parametrize("sum_of", REFUSED, ids=lambda f: f.__name__)
def test_what_is_no_list_says_why(sum_of: Callable[..., Tensor]) -> None:
    model, x = Mixture(sum_of).eval(), torch.randn(2, 5, WIDTH)
    gm, values = canonical(model, x)
    after, watch = recognised(gm)
    assert "experts" not in vocabulary(after)
    assert any(REFUSED[sum_of] in r.reason for r in watch.refusals if r.rule == "expert_list"), watch.refusals
    torch.testing.assert_close(after(*values)[0], model(x), **EXPERTS_SUMMED)


# ------------------------------------------------------------------------------------------- no share at all


class Shares(nn.Module):
    """experts on every row, with shares that `gates_of` makes of scores, the chosen and their scores."""

    def __init__(self, gates_of: Callable[[Tensor, Tensor, Tensor], Tensor], **options: object) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.gates_of, self.options = gates_of, options

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        """[T, H], [T, E] -> [T, H]"""
        values, ids = torch.topk(scores, CHOSEN, -1)
        options = {"kind": "silu", **self.options}
        up = self.gate_up if options.get("gated", True) else self.gate_up[:, :INNER]
        if options.pop("biased", False):
            options["down_bias"] = self.bias
        return ops.experts(x, None, self.gates_of(scores, ids, values), up, self.down, **options)  # type: ignore[arg-type]  # options of the call


def sigmoid_of_nothing(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.sigmoid(torch.full_like(scores, float("-inf")).scatter(1, ids, values))


def nothing_else(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(1, ids, values)


def scaled(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return nothing_else(scores, ids, values) / (values.abs().sum(-1, keepdim=True) + 1.0) * scores * 2.0


@pytest.mark.parametrize("gates_of", [sigmoid_of_nothing, nothing_else, scaled], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"biased": True}, {"scale_input": True}, {"scale_input": True, "gated": False, "kind": "gelu"}],
    ids=str,
)
def test_rows_skip_experts_without_a_share(
    gates_of: Callable[..., Tensor], options: dict[str, object]
) -> None:
    """f(0) = 0 is all that a share of 0 on the input needs, and a share of 0 on the output nothing."""
    model, x, scores = Shares(gates_of, **options), torch.randn(5, WIDTH), torch.randn(5, EXPERTS)
    gm, values = canonical(model, x, scores)
    after, watch = recognised(gm)
    assert g.arg(the_experts(after), "ids") is not None, watch.refusals
    assert [m.rule for m in watch.matches][-1] == "expert_choice"
    exact = raise_to_fp64(gm)(*values)
    assert judge(exact, gm(*values), after(*values), torch.float32).ok


def sigmoid_of_zero(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.sigmoid(torch.zeros_like(scores).scatter(1, ids, values))


def ones_elsewhere(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.ones_like(scores).scatter(1, ids, values)


def softmax_of_zeros(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(torch.zeros_like(scores).scatter(1, ids, values), -1)


def perhaps_twice(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(1, ids // 2, values)


def by_row(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(0, ids, values)


def added_after(scores: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    return nothing_else(scores, ids, values) + scores


SHARED: dict[tuple[Callable[..., Tensor], str], str | None] = {
    (sigmoid_of_zero, ""): "0.0 does not stay nothing in aten.sigmoid",
    (ones_elsewhere, ""): "is not filled with one value",
    (softmax_of_zeros, ""): "0.0 does not stay nothing in aten.softmax",
    (perhaps_twice, ""): "nothing says that a row chooses an expert once only",
    (by_row, ""): "puts shares elsewhere than in a row's experts",
    (added_after, ""): None,  # no path at all: nothing to tell
    (nothing_else, "biased"): "down_bias is added to what is scaled to nothing",
    (nothing_else, "up_offset"): "1.0 is added to up, which is scaled to nothing",
    (nothing_else, "sigmoid"): "sigmoid makes 0.5 of nothing",
}
OPTIONS: dict[str, dict[str, object]] = {
    "": {},
    "biased": {"biased": True},
    "up_offset": {"up_offset": 1.0},
    "sigmoid": {"gated": False, "kind": "sigmoid"},
}


@pytest.mark.parametrize(("gates_of", "option"), SHARED, ids=lambda x: getattr(x, "__name__", x))
def test_what_may_have_a_share_keeps_it(gates_of: Callable[..., Tensor], option: str) -> None:
    model = Shares(gates_of, scale_input=True, **OPTIONS[option])
    x, scores = torch.randn(5, WIDTH), torch.randn(5, EXPERTS)
    gm, values = canonical(model, x, scores)
    after, watch = recognised(gm)
    assert g.arg(the_experts(after), "ids") is None
    reason = SHARED[gates_of, option]
    told = [r.reason for r in watch.refusals if r.rule == "expert_choice"]
    assert not told if reason is None else any(reason in t for t in told), told
    torch.testing.assert_close(after(*values), gm(*values))


# ------------------------------------------------------------------------------------------------ taken back


def test_a_match_can_be_denied_and_burns_fuel() -> None:
    model, x = Mixture(columns).eval(), torch.randn(2, 5, WIDTH)
    gm, values = canonical(model, x)
    _, watch = recognised(gm)
    lists = [m for m in watch.matches if m.rule.startswith("expert_")]
    assert [m.rule for m in lists] == ["expert_list", "expert_choice"]
    for denied, left in ((lists[0], 0), (lists[1], 1)):
        after, told = recognised(gm, deny=frozenset({denied.id}))
        assert vocabulary(after).count("experts") == left
        assert any(r.reason == "denied" and r.rule == denied.rule for r in told.refusals)
        torch.testing.assert_close(after(*values)[0], model(x), **EXPERTS_SUMMED)
    for less in (1, 2):
        after, _ = recognised(gm, fuel=len(watch.matches) - less)
        assert vocabulary(after).count("experts") == 2 - less


def test_verification_runs_both_forms() -> None:
    model, x = Mixture(columns).eval(), torch.randn(2, 5, WIDTH)
    seen = len(backend.reports())
    compiled = torch.compile(model, backend="graphopt", options={"strict": True, "verify": "always"})
    compiled(x)
    checked = backend.reports()[seen].verification
    assert checked is not None and not checked.taken_back and not checked.not_verified
