"""The matcher: backtracking, leading dimensions, broadcasts, several outputs, scalars, misses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from graphopt import graph as g
from graphopt import match as matcher
from graphopt import ops, torch_private
from graphopt.binding import Binding, Miss
from graphopt.defaults import RULES
from graphopt.match import match
from graphopt.passes.canonicalize import canonicalize
from graphopt.rewrite import Refusal
from graphopt.rule import Int, Rule, T, rule, variants
from tests.rewriting import canonical, rewritten, vocabulary
from tests.rule_cases import NAMED
from tests.tensors import qkv, rand

Rewrites = Callable[..., None]
RefusalOf = Callable[..., Refusal]


def first(found: Rule, program: Callable[..., object], *args: Tensor) -> Binding | Miss:
    """The rule's first variant at the program's first output."""
    gm = canonical(program, *args)
    (variant,) = variants(found, {args[0].dtype}, canonicalize)
    return match(variant, g.output_node(gm.graph).all_input_nodes[0])


# --------------------------------------------------------------------------------------------------- search


def crossed(a: Tensor, b: Tensor) -> Tensor:
    """Both operands of the sum could be either product until the last leaf is seen."""
    return (a * b.exp()) * a + (a * b.exp().exp()) * b


def test_a_wrong_first_guess_is_taken_back_where_it_shows() -> None:
    """Each order of each sum and product matches, though the first guess fails four levels further up."""
    found = rule(crossed, lambda a, b: a, a=T("n"), b=T("n"))
    x, y = rand(4), rand(4)
    spellings: Sequence[Callable[[Tensor, Tensor], Tensor]] = (
        crossed,
        lambda a, b: (a * b.exp().exp()) * b + (a * b.exp()) * a,
        lambda a, b: b * (b.exp().exp() * a) + a * (b.exp() * a),
        lambda a, b: (b.exp() * a) * a + b * (a * b.exp().exp()),
    )
    for spelling in spellings:
        bound = first(found, spelling, x, y)
        assert isinstance(bound, Binding), bound.reason
        assert [str(bound["a"]), str(bound["b"])] == [str(n) for n in bound.leaves.values()]
    other = first(found, lambda a, b: (a * b.exp()) * a + (a * b.exp().exp()) * a, x, y)
    assert isinstance(other, Miss)


def test_a_guess_is_taken_back_for_a_later_output() -> None:
    """Which operand is x shows in the second output alone."""

    def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return total.exp(), total.exp().sin() * x

    found = rule(pair, lambda x, y: (x, y), x=T("n"), y=T("n"))
    for args in ((0, 1), (1, 0)):
        bound = first(found, lambda *t, args=args: pair(t[args[0]], t[args[1]])[::1], rand(4), rand(4))
        assert isinstance(bound, Binding), bound.reason


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that would need more steps than allowed is a miss that says so."""
    monkeypatch.setattr(matcher, "STEP_BOUND", 3)
    found = first(NAMED["hand_silu"], lambda x: x * torch.sigmoid(x), rand(4))
    assert isinstance(found, Miss) and found.reason == "gave up after 3 steps"


def test_a_size_that_nothing_determines_matches_nothing() -> None:
    """An expression with a name that stays unknown is a miss, not a wild card."""

    def folded(x: Tensor, rows: int, columns: int) -> Tensor:
        return x.reshape(rows * columns, 2).exp()

    found = rule(folded, lambda x, rows, columns: x, x=T("rows*columns*2"), rows=Int(2), columns=Int(3))
    missed = first(found, lambda x: x.reshape(6, 2).exp(), rand(12))
    assert isinstance(missed, Miss) and missed.reason == "nothing says what rows*columns*2 is"


# ------------------------------------------------------------------------------------- sizes and broadcasts


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_any(lead: tuple[int, ...]) -> None:
    """`...` stands for any number of them, the same for each tensor."""
    bound = first(NAMED["gated"], lambda a, b: ops.activation(a, "silu") * b, rand(*lead, 4), rand(*lead, 4))
    assert isinstance(bound, Binding) and bound.lead == lead


def test_leading_dimensions_that_differ_do_not_fit() -> None:
    """A gate that is broadcast is no gated activation of this op."""
    found = first(NAMED["gated"], lambda a, b: ops.activation(a, "silu") * b, rand(1, 4), rand(3, 4))
    assert isinstance(found, Miss) and "leading sizes" in found.reason


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 3, 8), (3, 8), (8,)])
def test_a_residual_may_be_broadcast(shape: tuple[int, ...]) -> None:
    """Position embeddings [1, length, n] are added as a residual of [batch, length, n]."""
    x = rand(2, 3, 8)
    for swap in (False, True):

        def program(a: Tensor, b: Tensor, swap: bool = swap) -> tuple[Tensor, Tensor]:
            total = b + a if swap else a + b
            return ops.rms_norm(total, None, 1e-6), total

        after, _ = rewritten(canonical(program, x, rand(*shape)), (NAMED["residual_rms_norm"],))
        assert vocabulary(after) == ["add_rms_norm"]


def test_one_mask_for_all_batches_and_heads() -> None:
    """`b|1`: a mask of size 1 there fits any batch."""
    q, k, _ = qkv()
    for shape in ((2, 2, 5, 5), (1, 1, 5, 5), (2, 1, 1, 5)):
        program = lambda q, k, m: ops.attention_scores(q, k, 1.0) + m
        after, _ = rewritten(canonical(program, q, k, rand(*shape)), (NAMED["added_mask"],))
        assert vocabulary(after) == ["attention_scores"] and len(list(after.graph.nodes)) == 5


# ------------------------------------------------------------------------------------------ several outputs


def turned(x: Tensor) -> Tensor:
    """The half-turn of rope."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def roped(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """One rotation; c and s have a dimension for heads."""
    return x * c + turned(x) * s


def test_layers_share_cos_and_sin() -> None:
    """q and k of one layer are paired, although every layer reads the same reshaped cos and sin."""

    def layers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        for _ in range(3):
            q, k = roped(x * 2.5, c, s), roped(x * 3.5, c, s)
            x = torch.softmax(q @ k.mT, -1) @ x
        return x

    args = rand(2, 3, 4, 8), rand(1, 4, 8), rand(1, 4, 8)
    after, _ = rewritten(canonical(layers, *args), RULES)
    assert vocabulary(after) == ["rope", "attention"] * 3
    torch.testing.assert_close(after(*args)[0], layers(*args))


def test_k_that_needs_the_rotated_q_is_not_paired_with_it(refusal_of: RefusalOf) -> None:
    """There is no place for one op: k is computed from what it gives for q."""

    def chained(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        return roped(roped(q, c, s) * 2.5, c, s)

    args = rand(2, 3, 4, 8), rand(1, 4, 8), rand(1, 4, 8)
    reason = refusal_of("llama_rope", chained, args).reason
    assert reason.endswith("which it needs, is computed from its own result")


def test_k_may_be_computed_after_q_is_rotated() -> None:
    """Only its use has to come later: the op stands where both are known."""

    def late(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        first = roped(q, c, s)
        second = roped(q.exp().sin(), c, s)
        return first, second

    args = rand(2, 3, 4, 8), rand(1, 4, 8), rand(1, 4, 8)
    after, _ = rewritten(canonical(late, *args), RULES)
    assert vocabulary(after) == ["rope"]
    for want, have in zip(late(*args), after(*args), strict=True):
        torch.testing.assert_close(have, want)


def test_an_odd_head_has_no_halves(refusal_of: RefusalOf) -> None:
    """The op rotates pairs; a model may cut 3 + 4."""

    def odd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        return roped(q, c, s), roped(k, c, s)

    args = rand(2, 3, 4, 7), rand(2, 3, 4, 7), rand(1, 4, 7), rand(1, 4, 7)
    assert refusal_of("llama_rope", odd, args).reason == "head_dim 7 is odd"


# ------------------------------------------------------------------------------------- scalars and symbols


def test_scalars_may_be_graph_values() -> None:
    """Under dynamic=True eps arrives as a node: it is bound as it is, and multiplied as nodes."""
    mode = torch_private.new_fake_mode(symbolic=True)
    with mode:
        x, w = torch.empty(2, 3, 8), torch.empty(8)
    eps = torch_private.symbolic_float(mode, "eps", 1e-5)

    def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    gm = canonical(norm, x, w, eps)
    after, _ = rewritten(gm, RULES)
    (node,) = [n for n in after.graph.nodes if g.is_call(n, ops.rms_norm.overload)]
    assert str(g.arg(node, "eps")) == str(g.placeholders(after.graph)[2])
    real = rand(2, 3, 8), rand(8)
    torch.testing.assert_close(after(*real, 0.25)[0], norm(*real, 0.25))


def test_scales_that_are_graph_values_are_multiplied_in_the_graph() -> None:
    """scale * factor becomes a node where one of them is a node."""
    mode = torch_private.new_fake_mode(symbolic=True)
    with mode:
        q, k = torch.empty(2, 3, 4, 8), torch.empty(2, 3, 5, 8)
    factor = torch_private.symbolic_float(mode, "factor", 0.125)
    program = lambda q, k, f: torch.softmax((q @ k.mT) * 0.5 * f, -1)
    after, _ = rewritten(canonical(program, q, k, factor), RULES)
    assert vocabulary(after) == ["attention_weights"]
    real = rand(2, 3, 4, 8), rand(2, 3, 5, 8)
    torch.testing.assert_close(after(*real, 0.75)[0], program(*real, 0.75))


# ---------------------------------------------------------------------------------------------------- words


def test_the_nearest_miss_says_what_was_expected_and_found(refusal_of: RefusalOf) -> None:
    """The operator that differs is named, with the node that stands there."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.sin())  # rules whose operators are nowhere in the graph are not even tried
        return w * (h * torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))

    refusal = refusal_of("llama_rms_norm", model, (rand(2, 8), rand(8)))
    assert refusal.reason == "expected aten.rsqrt, found aten.sqrt (sqrt)"
    assert refusal.node == "sqrt" and refusal.depth == 2


def test_a_literal_that_differs_is_named(refusal_of: RefusalOf) -> None:
    """An axis is part of the pattern."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5))

    assert refusal_of("llama_rms_norm", model, (rand(8, 8), rand(8))).reason == "expected -1, found -2"
