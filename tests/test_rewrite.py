"""The rewriter: ids, deny and fuel, provenance, places, refusals at the edit, idempotence, misses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt import graph as g
from graphopt import ops, rewrite, torch_private
from graphopt.binding import Binding
from graphopt.capture import capture
from graphopt.defaults import RULES
from graphopt.passes.canonicalize import canonicalize
from graphopt.place import Place, find_place
from graphopt.rewrite import Rewriter
from graphopt.rule import T, rule
from tests.rewriting import Watch, canonical, rewritten, vocabulary
from tests.rule_cases import NAMED

aten = torch.ops.aten


class Block(nn.Module):
    """A norm, a gated MLP and a residual, as Llama has them."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)
        self.gate, self.up = nn.Linear(size, 12, bias=False), nn.Linear(size, 12, bias=False)
        self.down = nn.Linear(12, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def stack() -> fx.GraphModule:
    """The canonical graph of two blocks."""
    gm = capture(Stack(), torch.randn(2, 3, 8)).gm
    canonicalize(gm)
    return gm


def ids(watch: Watch) -> list[str]:
    """The ids of what was applied."""
    return [m.id for m in watch.matches]


# ------------------------------------------------------------------------------------------ ids, deny, fuel


def test_ids_are_stable_and_each_is_one_match(stack: fx.GraphModule) -> None:
    """Two runs give the same ids; each is rule @ module path # hash."""
    (_, first), (_, second) = rewritten(stack, RULES), rewritten(stack, RULES)
    assert ids(first) == ids(second) and len(set(ids(first))) == len(ids(first))
    assert "llama_rms_norm@blocks.0#" in " ".join(ids(first))
    assert all(re.fullmatch(r"\w+@[\w.-]+#[0-9a-f]{6}(~\d+)?", i) for i in ids(first))


def test_a_denied_match_is_left_alone_and_the_others_are_made(stack: fx.GraphModule) -> None:
    """Deny goes by id; the refusal says so, and ids of the others stay."""
    _, all_of_them = rewritten(stack, RULES)
    denied = next(i for i in ids(all_of_them) if i.startswith("llama_rms_norm@blocks.1"))
    after, rest = rewritten(stack, RULES, deny=frozenset({denied}))
    assert denied not in ids(rest) and "bare_rms_norm" not in " ".join(ids(rest))  # nor a part of it
    assert {i for i in ids(all_of_them) if "blocks.0" in i} <= set(ids(rest))
    assert any(r.rule == "llama_rms_norm" and r.reason == "denied" for r in rest.refusals)
    x = torch.randn(2, 3, 8)
    inputs = [x if not g.is_weight(n) else torch.rand(g.shape(n)) for n in g.placeholders(stack.graph)]
    torch.testing.assert_close(after(*inputs)[0], stack(*inputs)[0])


@pytest.mark.parametrize("number", range(3))
def test_denying_one_of_several_alike_leaves_the_others_their_names(number: int) -> None:
    """Three equal matches of one module: each can be denied for itself, swept over or not."""

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    mine = rule(silu, lambda x: ops.activation(x, "silu"), x=T("... n"))
    gm = canonical(lambda x: (silu(x) + 1, silu(x * 2), silu(x * 3)), torch.randn(3, 5))
    three = ids(rewritten(gm, (mine,))[1])
    rest = ids(rewritten(gm, (mine,), deny=frozenset({three[number]}))[1])
    assert rest == [i for i in three if i != three[number]]


@pytest.mark.parametrize("fuel", [0, 1, 3, 1000])
def test_fuel_bounds_the_matches(stack: fx.GraphModule, fuel: int) -> None:
    """With fuel n the first n matches of the full run are made: bisection goes by this."""
    _, full = rewritten(stack, RULES)
    after, some = rewritten(stack, RULES, fuel=fuel)
    assert ids(some) == ids(full)[:fuel]
    after.graph.lint()


# --------------------------------------------------------------------------------------------- provenance


def test_new_nodes_say_where_they_come_from(stack: fx.GraphModule) -> None:
    """Origin (rule, id, captured nodes), module path, source line and value."""
    after, watch = rewritten(stack, RULES)
    norms = [n for n in after.graph.nodes if g.op_name(n) in ("rms_norm", "add_rms_norm")]
    assert [g.module_path(n) for n in norms] == ["blocks.0", "blocks.1"]
    captured = {n.name for n in stack.graph.nodes}
    for node in norms:
        origin = g.origin(node)
        assert origin is not None and origin.match in ids(watch)
        assert any(name.startswith("rsqrt") for name in origin.replaced) and captured & set(origin.replaced)
        assert "torch.rsqrt" in g.source(node) and "test_rewrite.py" in g.source(node)
    for node in after.graph.nodes:
        assert node.op == "output" or g.val(node) is not None, node


def test_a_rewrite_of_a_rewrite_stands_for_the_captured_nodes() -> None:
    """`attention` made from `attention_scores` names the matmul it began with."""
    x = torch.randn(2, 2, 4, 8)
    after, _ = rewritten(canonical(lambda q, k: torch.softmax(q @ k.mT * 0.5, -1) @ k, x, x + 1), RULES)
    (node,) = [n for n in after.graph.nodes if g.is_call(n, ops.attention.overload)]
    origin = g.origin(node)
    assert origin is not None and {"matmul", "mul", "softmax"} <= set(origin.replaced)


def test_abstract_values_are_those_of_the_run(stack: fx.GraphModule) -> None:
    """Shape and dtype of every new node are what the graph computes."""
    after, _ = rewritten(stack, RULES)
    inputs = [torch.rand(g.shape(n)) for n in g.placeholders(after.graph)]

    class Check(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                assert (tuple(value.shape), value.dtype) == (tuple(g.shape(n)), g.dtype(n)), n
            return value

    Check(after).run(*inputs)


# --------------------------------------------------------------------------------------- places and safety


def test_a_second_run_changes_nothing(stack: fx.GraphModule) -> None:
    """The fixpoint is one."""
    once, _ = rewritten(stack, RULES)
    twice, watch = rewritten(once, RULES)
    assert not watch.matches and g.fingerprint(once.graph) == g.fingerprint(twice.graph)


def test_everything_is_read_after_it_is_made() -> None:
    """A chain of ropes whose parts overlap in the graph's order stays in a legal order."""

    def turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s

    def program(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        a = turned(x, c, s)
        y = (x * 2.5).exp()
        b = turned(y, c, s)
        p = turned(a * b, c, s)
        q = turned(b.sin(), c, s)
        return p @ q.mT

    args = torch.randn(2, 3, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    after, _ = rewritten(canonical(program, *args), RULES)
    after.graph.lint()
    assert vocabulary(after) == ["rope", "rope"]
    torch.testing.assert_close(after(*args)[0], program(*args))


def test_there_may_be_no_place() -> None:
    """An input that is computed from an output is a cycle, however far it is from it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.sin.default, (x,))
    between = graph.call_function(aten.cos.default, (first,), name="cos")
    further = graph.call_function(aten.cos.default, (between,))
    second = graph.call_function(aten.sin.default, (further,))
    graph.output((first, second))
    cycle = "cos, which it needs, is computed from its own result"
    assert find_place(Binding(leaves={"a": x, "b": between}), [first, second]) == cycle
    assert find_place(Binding(leaves={"a": x, "b": further}), [first, second]) == cycle
    assert find_place(Binding(leaves={"a": x}), [first, second]) == Place(first)


def test_a_late_input_is_computed_earlier_unless_something_forbids_it() -> None:
    """It moves with what it needs, in order; an effect or a write in between keeps it where it is."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.sin.default, (x,))
    reader = graph.call_function(aten.neg.default, (first,))
    needed = graph.call_function(aten.exp.default, (x,))
    late = graph.call_function(aten.cos.default, (needed,), name="cos")
    second = graph.call_function(aten.sin.default, (late,))
    graph.output((reader, second))
    both = Binding(leaves={"a": x, "b": late})
    assert find_place(both, [first, second]) == Place(reader, (needed, late))
    with graph.inserting_before(late):
        graph.call_function(aten.relu_.default, (x,))
    after = "cos, which it needs, comes after a reader of its result and"
    assert find_place(both, [first, second]) == f"{after} a write"
    late.target = aten.bernoulli.default
    assert find_place(both, [first, second]) == f"{after} has an effect"


def _partly_turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    t, half = x[..., :4], 2
    t = t * c + torch.cat((-t[..., half:], t[..., :half]), -1) * s
    return torch.cat((t, x[..., 4:]), -1)


def _one_after_the_other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(_partly_turned(x, c, s) for x in (q, k))


def _used_before_k_is_made(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    q = _partly_turned(x.exp(), c, s).neg()
    return q, _partly_turned(y.exp(), c, s)


@pytest.mark.parametrize("program", [_one_after_the_other, _used_before_k_is_made])
def test_recognition_does_not_depend_on_the_order_of_statements(
    program: Callable[..., tuple[Tensor, ...]],
) -> None:
    """q is turned and used before k is even sliced: one rope for both all the same."""
    args = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    after, watch = rewritten(canonical(program, *args), RULES)
    after.graph.lint()
    assert vocabulary(after) == ["rope"], watch.refusals
    for have, want in zip(after(*args), program(*args), strict=True):
        torch.testing.assert_close(have, want)


def test_a_rope_of_a_rope_stays_a_chain() -> None:
    """The second rope reads the first one's result: they are no pair, and the reason says so."""

    def program(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        return _partly_turned(_partly_turned(x, c, s).exp(), c, s)

    args = torch.randn(2, 4, 3, 8), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    after, watch = rewritten(canonical(program, *args), RULES)
    assert not vocabulary(after)
    assert any("which it needs, is computed from its own result" in r.reason for r in watch.refusals)
    torch.testing.assert_close(after(*args)[0], program(*args))


def test_rules_that_undo_each_other_are_an_error() -> None:
    """The number of sweeps is bounded, and the error says what to look for."""

    def doubled(x: Tensor) -> Tensor:
        return torch.ops.aten.sin(x)

    def halved(x: Tensor) -> Tensor:
        return torch.ops.aten.cos(x)

    there = rule(doubled, lambda x: torch.cos(x), x=T("... n"))
    back = rule(halved, lambda x: torch.sin(x), x=T("... n"))
    gm = canonical(lambda x: (torch.sin(x), torch.cos(x)), torch.randn(3))
    with pytest.raises(RuntimeError, match="two of them undo each other"):
        rewritten(gm, (there, back))


def test_a_size_node_of_a_later_place_is_not_read_earlier() -> None:
    """Symbolic sizes that a replacement needs are nodes before its place, at each of several places."""
    mode = torch_private.new_fake_mode(symbolic=True)
    rows, width = torch_private.symbolic_int(mode, "rows", 6), torch_private.symbolic_int(mode, "width", 8)
    with mode:
        q, t = torch.empty(2, 3, rows, width), torch.empty(1, rows, width)

    def turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        half = 4
        return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s

    def program(q: Tensor, t: Tensor) -> Tensor:
        c, s = t.cos().unsqueeze(1), t.sin().unsqueeze(1)
        return turned(q, c, s) @ turned(q + 1, c, s).mT

    after, _ = rewritten(canonical(program, q, t), RULES)
    after.graph.lint()
    real = torch.randn(2, 3, 6, 8), torch.randn(1, 6, 8)
    torch.testing.assert_close(after(*real)[0], program(*real))


def test_misses_are_told_once_the_nearest_first(stack: fx.GraphModule) -> None:
    """Refusals are those of the last sweep, sorted by how far they came, and their number is bounded."""
    _, watch = rewritten(
        stack, (NAMED["gemma_rms_norm"], NAMED["hand_layer_norm_rsqrt"], NAMED["residual_rms_norm"])
    )
    depths = [r.depth for r in watch.refusals]
    assert depths == sorted(depths, reverse=True) and len(depths) <= rewrite.KEPT_MISSES
    assert len({(r.rule, r.node, r.reason) for r in watch.refusals}) == len(watch.refusals)


def test_observers_hear_each_match_when_it_is_made(stack: fx.GraphModule) -> None:
    """In order, with the new node's name in the graph."""
    copy = fx.GraphModule(stack, g.copy_graph(stack.graph))
    names: list[bool] = []

    class Present:
        def on_event(self, event: object) -> None:
            made = getattr(getattr(event, "match", None), "new_nodes", ())
            names.extend(name in {n.name for n in copy.graph.nodes} for name in made)

    applied = Rewriter(copy, RULES, canonicalize, (Present(),)).run()
    assert applied > 6 and names and all(names)


def test_an_operand_that_is_its_own_twin() -> None:
    """k and v may be one tensor, and their repeats one node: it is replaced, and erased, once."""

    def program(q: Tensor, k: Tensor) -> Tensor:
        repeated = k[:, :, None].expand(2, 2, 3, 5, 8).reshape(2, 6, 5, 8)
        return ops.attention(q, repeated, repeated, 0.5)

    args = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 5, 8)
    after, _ = rewritten(canonical(program, *args), RULES)
    assert [g.op_name(n) for n in after.graph.nodes if n.op == "call_function"] == ["attention"]
    torch.testing.assert_close(after(*args)[0], program(*args))
