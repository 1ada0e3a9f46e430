"""graphopt.flops: operations counted from shapes against hand-made sums, and the unrecognised share."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # it registers grouped_mm_fallback

from graphopt import ops
from graphopt.flops import flops, hint, total, unmatched, unmatched_share
from graphopt.torch_private import symbolic_int
from tests.sketch import Sketch

aten = torch.ops.aten


def test_products() -> None:
    s = Sketch()
    x, w, bias = s.input("x", 2, 7, 12), s.weight("w", 5, 12), s.weight("b", 5)
    q, k = s.input("q", 3, 7, 11), s.input("k", 3, 11, 13)
    assert flops(s.call(aten.linear.default, x, w)) == 2 * 2 * 7 * 12 * 5
    assert flops(s.call(aten.linear.default, x, w, bias)) == 2 * 2 * 7 * 12 * 5 + 2 * 7 * 5
    assert flops(s.call(ops.linear.overload, x, w, None)) == 2 * 2 * 7 * 12 * 5
    assert flops(s.call(aten.matmul.default, q, k)) == 2 * 3 * 7 * 11 * 13
    assert flops(s.call(aten.bmm.default, q, k)) == 2 * 3 * 7 * 11 * 13
    assert flops(s.call(aten.einsum.default, "bij,bjk->bik", [q, k])) == 2 * 3 * 7 * 11 * 13


def test_addmm_and_baddbmm() -> None:
    s = Sketch()
    bias, m, n = s.input("bias", 5), s.input("m", 7, 12), s.input("n", 12, 5)
    assert flops(s.call(aten.addmm.default, bias, m, n)) == 2 * 7 * 12 * 5
    a, b, c = s.input("a", 3, 7, 5), s.input("b", 3, 7, 12), s.input("c", 3, 12, 5)
    assert flops(s.call(aten.baddbmm.default, a, b, c)) == 2 * 3 * 7 * 12 * 5


def test_attention_counts_all_heads_and_both_products() -> None:
    s = Sketch()
    q, k, v = s.input("q", 2, 4, 7, 16), s.input("k", 2, 2, 9, 16), s.input("v", 2, 2, 9, 24)
    want = 2 * 4 * 7 * 9 * (2 * 16 + 2 * 24 + 1)
    assert flops(s.call(ops.attention.overload, q, k, v, 0.25)) == want
    assert flops(s.call(aten.scaled_dot_product_attention.default, q, k, v, enable_gqa=True)) == want


def test_convolution() -> None:
    s = Sketch()
    x, w = s.input("x", 2, 4, 8, 8), s.weight("w", 6, 2, 3, 3)
    node = s.call(aten.conv2d.default, x, w, None, [1, 1], [1, 1], [1, 1], 2)
    assert flops(node) == 2 * (2 * 6 * 8 * 8) * (2 * 3 * 3)


def test_elementwise_and_views() -> None:
    s = Sketch()
    x, row = s.input("x", 2, 7, 12), s.input("row", 12)
    assert flops(s.call(aten.mul.Tensor, x, row)) == 168
    assert flops(s.call(aten.mean.dim, x, [-1], True)) == 168  # its operand, not its result
    assert flops(s.call(ops.rms_norm.overload, x, row, 1e-6)) == 4 * 168
    assert flops(s.call(aten.permute.default, x, [0, 2, 1])) == 0
    assert flops(x) == 0


def test_symbolic_sizes_use_the_example() -> None:
    s = Sketch()
    size = symbolic_int(s.mode, "rows", 5)
    x, w = s.input("x", size, 12), s.weight("w", 3, 12)
    assert flops(s.call(aten.linear.default, x, w)) == 2 * 5 * 12 * 3
    assert hint(size + 2) == 7
    assert s.mode.shape_env is not None
    assert hint(s.mode.shape_env.create_unbacked_symint()) == 1
    assert not s.mode.shape_env.guards


def test_unmatched_share() -> None:
    s = Sketch()
    x, w = s.input("x", 7, 12), s.weight("w", 12, 12)
    known = s.call(ops.linear.overload, x, w, None)
    missed = s.call(aten.matmul.default, known, w)
    gm = s.done(s.call(aten.add.Tensor, missed, x))
    product = 2 * 7 * 12 * 12
    assert total(gm.graph) == 2 * product + 84
    assert unmatched(gm.graph) == {"aten.matmul": product / (2 * product + 84)}
    assert unmatched_share(gm.graph) == pytest.approx(product / (2 * product + 84))


def test_products_with_chosen_matrices() -> None:
    s = Sketch()
    rows, weight = s.input("rows", 7, 12), s.weight("w", 3, 12, 5)
    ends, ids = s.input("ends", 3, dtype=torch.int32), s.input("ids", 7, dtype=torch.int64)
    product = 2 * 7 * 12 * 5
    assert flops(s.call(ops.expert_matmul.overload, rows, weight, ids)) == product
    fallback = s.call(torch.ops.transformers.grouped_mm_fallback.default, rows, weight, ends)
    assert flops(fallback) == product
    gm = s.done(fallback)
    assert unmatched(gm.graph) == {"transformers.grouped_mm_fallback": product / total(gm.graph)}


def test_nothing_is_unmatched_where_all_heavy_work_is_ours() -> None:
    s = Sketch()
    x, w = s.input("x", 7, 12), s.weight("w", 12, 12)
    assert unmatched(s.done(s.call(ops.linear.overload, x, w, None)).graph) == {}
    assert unmatched_share(Sketch().done().graph) == 0.0
