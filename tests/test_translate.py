"""Every translation of a torch operator: the two agree, and what ours does not say is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # it registers grouped_mm_fallback
from torch import Tensor

from graphopt.accuracy import raise_to_fp64
from graphopt.defaults import RULES
from tests.rewriting import agree, canonical, rewritten
from tests.rule_cases import DTYPES, TRANSLATIONS

Maker = Callable[[torch.dtype], tuple[Tensor, ...]]


def _made(*shapes: tuple[int, ...]) -> Maker:
    random = torch.Generator().manual_seed(3)
    full = [torch.randn(shape, generator=random) for shape in shapes]
    return lambda dtype: tuple(x.to(dtype) for x in full)


HEADS = _made((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6))
GROUPS = _made((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6))
ONE_KV = _made((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 6))  # broadcast, with and without enable_gqa
KEPT = torch.tensor([[True, False, True, True, False]]).expand(3, 5)
F = torch.nn.functional
SOME_EXPERTS = _made((7, 16), (3, 16, 24))


def _ends(experts: int, sort: bool = True) -> Tensor:
    """Where the groups of 7 rows end that choose 1 0 1 0 1 0 0 of `experts`."""
    ids = torch.tensor([1, 0, 1, 0, 1, 0, 0])
    counted = torch.sort(ids)[0] if sort else ids * 1
    counts = torch.histc(counted.float(), bins=experts, min=0, max=experts - 1)
    return torch.cumsum(counts, 0, dtype=torch.int32)


FALLBACK = torch.ops.transformers.grouped_mm_fallback
TRANSLATED: tuple[tuple[str, Callable[..., Tensor], Maker], ...] = (
    ("torch_sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), HEADS),
    ("torch_sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), HEADS),
    ("torch_sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=KEPT), HEADS),
    (
        "torch_sdpa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q[:1, :1, :, :5]),
        HEADS,
    ),
    ("torch_sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), GROUPS),
    ("torch_sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), ONE_KV),
    ("torch_linear", lambda x, w: F.linear(x, w), _made((2, 3, 8), (5, 8))),
    ("torch_linear", lambda x, w, b: F.linear(x, w, b), _made((8,), (5, 8), (5,))),
    ("torch_layer_norm", lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-3), _made((2, 3, 8), (8,), (8,))),
    ("torch_layer_norm", lambda x: F.layer_norm(x, (8,)), _made((8,))),
    ("torch_layer_norm", lambda x, b: F.layer_norm(x, (8,), None, b), _made((3, 8), (8,))),
    ("torch_rms_norm", lambda x, w: F.rms_norm(x, (8,), w, 1e-3), _made((2, 3, 8), (8,))),
    ("torch_rms_norm", lambda x: F.rms_norm(x, (8,)), _made((3, 8))),
    ("torch_silu", lambda x: F.silu(x), _made((2, 3))),
    ("torch_relu", lambda x: torch.relu(x), _made(())),
    ("torch_gelu", lambda x: F.gelu(x), _made((2, 3))),
    ("torch_gelu", lambda x: F.gelu(x, approximate="tanh"), _made((5,))),
    ("torch_grouped_mm", lambda x, w: F.grouped_mm(x, w, offs=_ends(3)), SOME_EXPERTS),
    ("grouped_mm_fallback", lambda x, w: FALLBACK(x, w, _ends(3)), SOME_EXPERTS),
    ("where_full", lambda x, y: torch.where(y > 0, x, torch.full([], -2.5)), _made((2, 3), (3,))),
    ("where_full", lambda x, y: torch.where(y > 0, x, torch.full_like(x, 2.5)), _made((2, 3), (2, 3))),
    ("fill_full", lambda x, y: x.masked_fill(y > 0, torch.full([], -2.5)), _made((2, 3), (3,))),
    ("maximum_full", lambda x: torch.max(x, torch.full((), 0.125)), _made((2, 3))),
    ("maximum_full", lambda x: torch.maximum(x, torch.full_like(x, -0.3)), _made((2, 3))),
)


TAKEN = {"torch_grouped_mm": (torch.bfloat16,)}  # its fake refuses the others


def test_every_translation_is_tried() -> None:
    """A row of the table without a test here is an error."""
    assert {name for name, _, _ in TRANSLATED} == {t.name for t in TRANSLATIONS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(TRANSLATED)), ids=lambda i: f"{TRANSLATED[i][0]}-{i}")
def test_translation_holds(index: int, dtype: torch.dtype) -> None:
    """torch's operator and ours agree; the translation is made once and leaves nothing to translate."""
    name, program, maker = TRANSLATED[index]
    if dtype not in TAKEN.get(name, DTYPES):
        return
    inputs = maker(dtype)
    before = canonical(program, *inputs)
    (exact,) = raise_to_fp64(before)(*inputs)
    after, seen = rewritten(before, TRANSLATIONS)
    assert [m.rule for m in seen.matches] == [name], seen.refusals
    agree(exact, program(*inputs), after(*inputs)[0], dtype, name)
    assert not rewritten(after, TRANSLATIONS)[1].matches


def _sdpa(**options: object) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


REFUSED: tuple[tuple[str, Callable[..., Tensor], Maker, str], ...] = (
    ("torch_sdpa", _sdpa(dropout_p=0.5), HEADS, "dropout 0.5 is on"),
    (
        "torch_sdpa",
        _sdpa(),
        _made((4, 3, 8), (4, 5, 8), (4, 5, 6)),
        "q, k and v have [3, 3, 3] dimensions, not 4",
    ),
    ("torch_sdpa", _sdpa(), _made((2, 4, 3, 8), (2, 4, 5, 8), (2, 1, 5, 6)), "k has 4 heads and v 1"),
    ("torch_sdpa", _sdpa(), _made((2, 4, 3, 8), (1, 4, 5, 8), (2, 4, 5, 6)), "batch sizes 2, 1 and 2"),
    ("torch_sdpa", _sdpa(), _made((2, 4, 3, 8), (2, 4, 5, 8), (1, 4, 5, 6)), "batch sizes 2, 2 and 1"),
    (
        "torch_layer_norm",
        lambda x: F.layer_norm(x, (3, 8)),
        _made((2, 3, 8)),
        "normalises over [3, 8], not one",
    ),
    ("torch_rms_norm", lambda x: F.rms_norm(x, (3, 8)), _made((2, 3, 8)), "normalises over [3, 8], not one"),
    ("torch_relu", lambda x: torch.relu((x * 5).int()), _made((2, 3)), "x is torch.int32, not floating"),
    ("where_full", lambda x, y: torch.where(x > 0, x, y), _made((2,), (2,)), "other is no constant"),
    (
        "where_full",
        lambda x: torch.where(x > 0, x, torch.full([2, 3], 1.5)),
        _made((3,)),
        "other decides the shape",
    ),
    (
        "where_full",
        lambda x: torch.where(x > 0, x, torch.full([3], 1.5, dtype=torch.float64)),
        _made((3,)),
        "other decides the dtype",
    ),
    (
        "where_full",
        lambda x: torch.where(x > 0, x, torch.full([], 0.1, dtype=torch.float16)),
        _made((3,)),
        "other is 0.1 as torch.float16: 0.0999755859375",
    ),
    ("maximum_full", lambda x, y: torch.maximum(x, y), _made((2,), (2,)), "other is no constant"),
    ("maximum_full", lambda x: torch.maximum(x, torch.full([2, 3], 0.1)), _made((3,)), "decides the shape"),
    (
        "maximum_full",
        lambda x: torch.maximum(x, torch.full([3], 0.1, dtype=torch.float64)),
        _made((3,)),
        "other decides the dtype",
    ),
    ("torch_linear", lambda x, w: F.linear(x, w), _made((3, 8), (8,)), "the weight has 1 dimensions, not 2"),
    (
        "grouped_mm_fallback",
        lambda x, w: FALLBACK(x, w, torch.tensor([4, 7, 7], dtype=torch.int32)),
        SOME_EXPERTS,
        "the ends of the groups are no cumsum",
    ),
    (
        "grouped_mm_fallback",
        lambda x, w: FALLBACK(x, w, torch.cumsum((w[:, 0, 0] * 0 + 2).int(), 0, dtype=torch.int32)),
        SOME_EXPERTS,
        "the sizes of the groups are no histc over the experts",
    ),
    (
        "grouped_mm_fallback",
        lambda x, w: FALLBACK(x, w, _ends(3, sort=False)),
        SOME_EXPERTS,
        "the ids that are counted are not sorted",
    ),
    (
        "grouped_mm_fallback",
        lambda x, w: FALLBACK(x, w, torch.cumsum(torch.histc(x[:, 0], 3, -1, 2), 0, dtype=torch.int32)),
        SOME_EXPERTS,
        "histc counts (3, -1, 2), not (bins, min, max) = (3, 0, 2)",
    ),
)


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda i: f"{REFUSED[i][0]}-{i}")
def test_translation_is_refused(index: int) -> None:
    """What our op does not say is left to torch, with the reason; torch takes it, and the numbers stay."""
    name, program, maker, reason = REFUSED[index]
    inputs = maker(torch.float32)
    after, seen = rewritten(canonical(program, *inputs), RULES)
    assert name not in [m.rule for m in seen.matches]
    assert any(r.rule == name and reason in r.reason for r in seen.refusals), seen.refusals
    if "dropout" not in reason:
        torch.testing.assert_close(after(*inputs)[0], program(*inputs))
