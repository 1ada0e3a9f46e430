"""Masks are read for what they mean, and every reading is run against the mask that it claims to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.capture import from_dynamo
from graphopt.masks import MaskForm, arguments, classify, describe, probe
from graphopt.masks.classification import sorted_form
from graphopt.masks.term import KEY, QUERY, AtLeast, Space, all_of, at_least
from graphopt.passes.canonicalize import canonicalize

MIN = torch.finfo(torch.float32).min
INF = float("-inf")

Mask = Callable[..., torch.Tensor]


# ----------------------------------------------------------------------------------------------- helpers


def traced(mask: Mask, examples: Sequence[torch.Tensor], symbolic: bool = False) -> fx.GraphModule:
    """The canonical graph of a function; `symbolic`: every dimension of every example is its own size."""
    mode = torch_private.new_fake_mode(symbolic=symbolic)
    fakes: list[object] = []
    for n, x in enumerate(examples):
        if not symbolic:
            fakes.append(mode.from_tensor(x, static_shapes=True))
            continue
        sizes = [torch_private.symbolic_int(mode, f"s{n}_{d}", size) for d, size in enumerate(x.shape)]
        with mode:
            fakes.append(torch.empty(sizes, dtype=x.dtype))
    gm = torch_private.trace(mask, fakes, mode)
    canonicalize(gm)
    return gm


def mask_node(gm: fx.GraphModule) -> fx.Node:
    """The output of a graph of one output."""
    result = g.output_node(gm.graph).args[0]
    return result[0] if isinstance(result, (list, tuple)) else result  # type: ignore[return-value]  # one output


def read(mask: Mask, *examples: torch.Tensor, heads: int = 3, symbolic: bool = False) -> MaskForm:
    """The form of a mask; its arguments, made in the graph and run there, must give the mask itself."""
    gm = traced(mask, examples, symbolic)
    node = mask_node(gm)
    sizes = (1, 1, 1, 1, *g.shape(node))[-4:]
    form = classify(node, (sizes[0], heads if sizes[1] == 1 else sizes[1], *sizes[2:]))
    assert isinstance(form, MaskForm), form
    assert_same_mask(gm, form, mask, examples)
    return form


def reason(mask: Mask, *examples: torch.Tensor, sizes: tuple[int, int, int, int]) -> str:
    """Why a mask has no form."""
    result = classify(mask_node(traced(mask, examples)), sizes)
    assert isinstance(result, str), describe(result)
    return result


def assert_same_mask(
    gm: fx.GraphModule, form: MaskForm, mask: Mask, examples: Sequence[torch.Tensor]
) -> None:
    """Run the made arguments in the graph, apply the definition of `ops.attention`, compare with eager."""
    made = arguments(form)
    parts = (made.offset, made.offset_tensor, made.window, made.key_padding, made.bias)
    g.output_node(gm.graph).args = (parts,)
    gm.graph.lint()
    gm.recompile()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values = [random_like(x, generator) for x in examples]
        want = ~mask(*values) if form.inverted else mask(*values)
        offset, tensor, window, padding, bias = gm(*values)
        q, k = ((1, 1, *want.shape))[-2:]
        i, j = torch.arange(q)[:, None], torch.arange(k)
        off = offset if tensor is None else offset + tensor
        keep = torch.ones(1, 1, q, k, dtype=torch.bool)
        keep = keep & (j <= i + off) if made.causal else keep
        keep = keep & (j > i + off - window) if window is not None else keep
        keep = keep & padding[:, None, None, :] if padding is not None else keep
        keep = keep & bias if bias is not None and bias.dtype == torch.bool else keep
        got = keep
        if want.dtype != torch.bool:
            got = torch.zeros(keep.shape, dtype=want.dtype).masked_fill(~keep, form.additive_fill or INF)
            got = got + bias if bias is not None and bias.dtype != torch.bool else got
        torch.testing.assert_close(*torch.broadcast_tensors(got, want), rtol=0, atol=0)


def random_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Coin flips for bool, small numbers for int, normal ones for float."""
    if x.dtype.is_floating_point:
        return torch.randn(x.shape, generator=generator).to(x.dtype)
    numbers = 2 if x.dtype == torch.bool or x.dim() else 5
    return torch.randint(numbers, x.shape, generator=generator).to(x.dtype)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def flags(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


def indices(batch: int, q: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch, query and key indices as the model library makes them: 4-D, each along its own dimension."""
    return (
        torch.arange(batch)[:, None, None, None],
        torch.arange(q)[None, None, :, None],
        torch.arange(k)[None, None, None, :],
    )


def library_mask(
    padding: torch.Tensor, q: int, k: int, offset: object = 0, window: int | None = None
) -> torch.Tensor:
    """`causal & window & padding[b, j]` in the spelling of the model library, without vmap."""
    b, i, j = indices(padding.shape[0], q, k)
    i = i + offset
    mask = i.new_ones((), dtype=torch.bool)
    if window is not None:
        mask = mask & (j > i - window).to(mask.device)
    mask = mask & (j <= i).to(mask.device)
    return (mask & padding.to(torch.bool)[b, j]).expand(padding.shape[0], -1, q, k)


# ------------------------------------------------------------------------------------------------ causal


def test_no_mask_at_all() -> None:
    form = read(lambda x: torch.ones(7, 7, dtype=torch.bool), ids(2, 7))
    assert describe(form) == "all keys"


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: torch.ones(7, 7, dtype=torch.bool).tril(),
        lambda x: ~torch.ones(7, 7, dtype=torch.bool).triu(1),
        lambda x: torch.arange(7)[None, :] <= torch.arange(7)[:, None],
        lambda x: torch.arange(7)[None, :] < torch.arange(7)[:, None] + 1,
        lambda x: torch.arange(7)[:, None] >= torch.arange(7)[None, :],
        lambda x: torch.arange(7)[:, None] - torch.arange(7)[None, :] > -1,
        lambda x: torch.logical_not(torch.arange(7)[None, :] > torch.arange(7)[:, None]),
        lambda x: torch.ones(7, 7).tril().to(torch.bool),
        lambda x: (1 - torch.ones(7, 7).triu(diagonal=1)) != 0,
        lambda x: (1 - torch.ones(7, 7).triu(diagonal=1)) > 0.5,
        lambda x: (torch.arange(7.0)[:, None] - torch.arange(7.0)[None, :]) >= 0,
    ],
)
def test_causal_in_many_spellings(mask: Mask) -> None:
    assert describe(read(mask, ids(2, 7))) == "causal"


@pytest.mark.parametrize(("shift", "offset"), [(-1, -1), (2, 2), (5, 5)])
def test_causal_with_an_int_offset(shift: int, offset: int) -> None:
    form = read(lambda x: torch.ones(7, 12, dtype=torch.bool).tril(shift), ids(2, 7))
    assert (form.causal, form.offset, form.offset_tensor, form.rest) == (True, offset, None, None)


def test_strictly_before_is_causal_with_offset_minus_one() -> None:
    form = read(lambda x: torch.arange(7)[None, :] < torch.arange(7)[:, None], ids(2, 7))
    assert (form.causal, form.offset) == (True, -1)


def test_the_tighter_of_two_causal_terms_counts() -> None:
    both = lambda x: torch.ones(7, 9, dtype=torch.bool).tril(2) & torch.ones(7, 9, dtype=torch.bool).tril(1)
    form = read(both, ids(2, 7))
    assert (form.causal, form.offset) == (True, 1)


def test_offset_past_the_keys_hides_nothing() -> None:
    assert describe(read(lambda x: torch.ones(7, 9, dtype=torch.bool).tril(8), ids(2, 7))) == "all keys"


def test_causal_with_a_tensor_offset() -> None:
    form = read(lambda p, n: library_mask(p, 7, 20, offset=n), ids(2, 20), torch.tensor(5))
    assert form.causal and form.offset == 0
    assert form.offset_tensor is not None and form.offset_tensor.op == "placeholder"


def test_tensor_offset_of_one_element_plus_a_number() -> None:
    form = read(lambda p, n: library_mask(p, 7, 20, offset=n + 2, window=4), ids(2, 20), torch.tensor([5]))
    assert (form.causal, form.offset, form.window) == (True, 2, 4)
    assert form.offset_tensor is not None


def test_one_query_is_causal_by_its_offset() -> None:
    form = read(lambda p, n: library_mask(p, 1, 20, offset=n, window=6), ids(2, 20), torch.tensor(5))
    assert (form.causal, form.offset, form.window) == (True, 0, 6)
    assert form.offset_tensor is not None and form.rest is None


def test_positions_from_a_tensor_are_not_taken_for_a_range() -> None:
    form = read(lambda p: torch.arange(7)[None, None, None, :] <= p[:, None, :, None], ids(2, 7))
    assert not form.causal and form.rest is not None and form.note.startswith("a tensor for")


def test_an_offset_of_two_tensors_stays_a_tensor() -> None:
    mask = lambda x, a, b: torch.arange(9)[None, :] <= torch.arange(7)[:, None] + a + b
    form = read(mask, ids(2, 7), torch.tensor(1), torch.tensor(2))
    assert not form.causal and form.rest is not None


# ------------------------------------------------------------------------------------------------ window


@pytest.mark.parametrize("window", [1, 3, 6])
def test_window_shorter_than_the_length(window: int) -> None:
    form = read(lambda p: library_mask(p, 7, 7, window=window), ids(3, 7))
    assert (form.causal, form.offset, form.window, form.rest) == (True, 0, window, None)


@pytest.mark.parametrize("window", [7, 8, 4096])
def test_window_that_reaches_past_static_sizes_is_no_window(window: int) -> None:
    form = read(lambda p: library_mask(p, 7, 7, window=window), ids(3, 7))
    assert (form.causal, form.window) == (True, None)


def test_window_is_measured_from_the_offset() -> None:
    form = read(lambda p: library_mask(p, 5, 12, offset=7, window=4), ids(3, 12))
    assert (form.offset, form.window) == (7, 4)


def test_window_whose_offset_differs_from_the_causal_one() -> None:
    def mask(x: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
        return (j <= i + 2) & (i - j < 3)

    form = read(mask, ids(2, 7))
    assert (form.causal, form.offset, form.window, form.rest) == (True, 2, 5, None)


def test_window_without_causal() -> None:
    form = read(lambda x: torch.arange(9)[:, None] - torch.arange(9)[None, :] < 3, ids(2, 7))
    assert (form.causal, form.window) == (False, 3)


def test_two_sided_window_is_causal_with_an_offset() -> None:
    form = read(lambda x: (torch.arange(9)[:, None] - torch.arange(9)[None, :]).abs() <= 2, ids(2, 7))
    assert (form.causal, form.offset, form.window, form.rest) == (True, 2, 5, None)


# ----------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("example", [ids(3, 7), flags(3, 7), ids(1, 7)])
def test_padding_with_causal(example: torch.Tensor) -> None:
    form = read(lambda p: library_mask(p, 7, 7), example)
    assert form.causal and form.key_padding is not None and form.rest is None


def test_padding_alone() -> None:
    def mask(p: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(2, 7, 7)
        return ((i >= 0) & p[b, j]).expand(2, 1, 7, 7)

    form = read(mask, flags(2, 7))
    assert describe(form) == f"{form.leaves[0].name}[b, j]"


def test_padded_padding_for_a_longer_cache() -> None:
    grow = lambda p: torch.nn.functional.pad(p.to(torch.bool), [0, 13])
    form = read(lambda p: library_mask(grow(p), 7, 20, window=5), ids(2, 7))
    assert (form.causal, form.window, form.rest) == (True, 5, None)
    made = arguments(form)
    assert g.is_call(made.key_padding, torch.ops.aten.pad.default)  # the tensor that is there, no copy


def test_padding_longer_than_the_keys_is_sliced() -> None:
    form = read(lambda p: p[:, None, None, 2:9], flags(2, 12))
    made = arguments(form)
    assert g.is_call(made.key_padding, torch.ops.aten.slice.Tensor)


def test_several_paddings_are_one() -> None:
    mask = lambda p, q: p[:, None, None, :] & q[None, None, None, :] & library_mask(p, 7, 7)
    form = read(mask, flags(2, 7), flags(1, 7)[0])
    assert form.causal and form.rest is None and form.key_padding is not None


def test_keys_past_a_length_are_padding() -> None:
    mask = lambda p, n: (torch.arange(7) < n)[None, None, None, :] & library_mask(p, 5, 7)
    form = read(mask, ids(2, 7), torch.tensor(4))
    assert form.causal and form.rest is None


def test_query_padding_is_no_key_padding() -> None:
    form = read(lambda p: p[:, None, :, None] & torch.ones(7, 7, dtype=torch.bool).tril(), flags(2, 7))
    assert form.causal and form.key_padding is None and form.rest is not None


def test_inverted_mask_hides_where_true() -> None:
    mask = lambda p: torch.ones(7, 7, dtype=torch.bool).triu(1) | ~p[:, None, None, :]
    gm = traced(mask, [flags(2, 7)])
    form = classify(mask_node(gm), (2, 3, 7, 7), inverted=True)
    assert isinstance(form, MaskForm) and form.causal and form.rest is None and form.key_padding is not None
    assert_same_mask(gm, form, mask, [flags(2, 7)])


# ---------------------------------------------------------------------------------------------- additive


@pytest.mark.parametrize(("fill", "expected"), [(INF, None), (MIN, MIN), (-1e9, -1e9)])
def test_additive_mask_and_its_fill(fill: float, expected: float | None) -> None:
    form = read(lambda p: torch.where(library_mask(p, 7, 7, window=3), torch.zeros(()), fill), ids(2, 7))
    assert (form.causal, form.window, form.additive_fill, form.bias) == (True, 3, expected, None)
    assert arguments(form).empty_rows_mean == (expected is not None)


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: torch.full((7, 7), INF).triu(1),
        lambda x: torch.full((7, 7), INF).masked_fill(torch.ones(7, 7, dtype=torch.bool).tril(), 0),
        lambda x: torch.zeros(7, 7).masked_fill(torch.arange(7) > torch.arange(7)[:, None], INF),
        lambda x: torch.full((7, 7), INF).triu(1) + torch.full((7, 7), INF).triu(1),
        lambda x: torch.full((7, 7), INF).triu(1) + torch.zeros(7, 7),
    ],
)
def test_additive_causal_in_many_spellings(mask: Mask) -> None:
    assert describe(read(mask, ids(2, 7))) == "causal"


def test_sum_of_additive_masks_is_their_conjunction() -> None:
    pad = lambda p: torch.zeros(2, 1, 1, 7).masked_fill(~p[:, None, None, :], INF)
    form = read(lambda p: pad(p) + torch.full((7, 7), INF).triu(1), flags(2, 7))
    assert form.causal and form.key_padding is not None and form.bias is None


def test_one_minus_mask_times_min() -> None:
    form = read(lambda p: (1.0 - p[:, None, None, :].float()) * MIN, flags(2, 7))
    assert form.key_padding is not None and (form.additive_fill, form.bias) == (MIN, None)


def test_one_minus_mask_times_min_of_numbers_stays_added() -> None:
    """The mask may hold a 2; that it is 0 or 1 is not in the graph."""
    form = read(lambda p: (1.0 - p[:, None, None, :].float()) * MIN, ids(2, 7))
    assert form.bias is not None and form.key_padding is None


def test_inverted_numbers_filled_where_not_zero() -> None:
    def mask(p: torch.Tensor) -> torch.Tensor:
        inverted = 1.0 - p[:, None, None, :].expand(2, 1, 7, 7).float()
        return inverted.masked_fill(inverted.to(torch.bool), MIN)

    form = read(mask, ids(2, 7))
    assert form.key_padding is not None and form.bias is None and form.additive_fill == MIN


def test_fill_is_what_the_dtype_holds() -> None:
    """fp32's finfo.min is -inf in bf16: rows without keys are then zeros, not means."""
    causal = lambda x: torch.where(torch.ones(7, 7, dtype=torch.bool).tril(), 0.0, MIN)
    assert read(causal, ids(2, 7)).additive_fill == MIN
    assert read(lambda x: causal(x).to(torch.bfloat16), ids(2, 7)).additive_fill is None


def test_two_finite_fills_stay_a_tensor() -> None:
    """min + min = -inf: in a row without keys some keys then count and some do not."""

    def mask(p: torch.Tensor) -> torch.Tensor:
        causal = torch.zeros(7, 7).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), MIN)
        return causal + torch.zeros(2, 1, 1, 7).masked_fill(~p[:, None, None, :], MIN)

    form = read(mask, flags(2, 7))
    assert form.whole and "rows without keys differ" in form.note


@pytest.mark.parametrize("fill", [-10000.0, -1.0, 3.0])
def test_small_literals_are_a_bias_not_a_mask(fill: float) -> None:
    mask = lambda x: torch.zeros(7, 7).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), fill)
    form = read(mask, ids(2, 7))
    assert form.whole and f"adds {fill}" in form.note


def test_bias_beside_a_mask() -> None:
    form = read(lambda x: torch.full((7, 7), INF).triu(1) + x, torch.ones(2, 3, 7, 7))
    assert form.causal and form.bias is not None and form.bias.node.op == "placeholder"


def test_bias_beside_a_finite_fill_stays_one_tensor() -> None:
    """If the bias hides keys too, then in a row without keys both kinds of hidden keys count in eager."""
    form = read(lambda x: torch.full((7, 7), MIN).triu(1) + x, torch.ones(2, 3, 7, 7))
    assert form.whole and "hides by" in form.note


# -------------------------------------------------------------------------------------------------- rest


def test_packed_sequences_keep_their_tensor_and_lose_their_causal_part() -> None:
    def mask(p: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(2, 7, 7)
        return (p[b, i] == p[b, j]) & (j <= i)

    form = read(mask, ids(2, 7))
    assert form.causal and form.rest is not None and form.key_padding is None


def packed_detection(positions: torch.Tensor) -> torch.Tensor:
    """The model library's test for packed sequences: a jump in the positions starts a new sequence."""
    first = positions[:, :1] - 1
    return (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)


def test_packed_detection_of_a_plain_range_vanishes() -> None:
    def mask(n: torch.Tensor) -> torch.Tensor:
        positions = (torch.arange(7) + n).unsqueeze(0).expand(2, -1)
        b, i, j = indices(2, 7, 7)
        sequence = packed_detection(positions)
        return ((sequence[b, i] == sequence[b, j]) & (positions[b, j] <= positions[b, i])).expand(2, -1, 7, 7)

    assert describe(read(mask, torch.tensor(0))) == "causal"


def test_packed_detection_of_given_positions_stays() -> None:
    def mask(positions: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(2, 7, 7)
        sequence = packed_detection(positions)
        return (sequence[b, i] == sequence[b, j]) & (j <= i)

    form = read(mask, ids(2, 7))
    assert form.causal and form.rest is not None


def test_mask_given_whole_stays_whole() -> None:
    form = read(lambda m: m, torch.ones(2, 3, 7, 7, dtype=torch.bool))
    made = arguments(form)
    assert not form.causal and made.bias is form.mask and made.key_padding is None


def test_float_mask_given_whole_stays_whole() -> None:
    form = read(lambda m: m, torch.zeros(2, 1, 7, 7))
    assert form.whole and arguments(form).bias is form.mask


def test_given_mask_beside_causal_is_separated() -> None:
    given = torch.ones(2, 3, 7, 7, dtype=torch.bool)
    form = read(lambda m: m & torch.ones(7, 7, dtype=torch.bool).tril(), given)
    made = arguments(form)
    assert form.causal and made.bias is not None and made.bias.op == "placeholder"


def test_mask_by_head() -> None:
    mask = lambda m: m[None, :, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    form = read(mask, flags(3, 1)[:, 0])
    assert form.causal and form.key_padding is None and form.rest is not None


def test_prefix_that_sees_itself_is_no_causal_mask() -> None:
    def mask(p: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(2, 7, 7)
        return (j <= i) | (p[b, j] & p[b, i])

    form = read(mask, flags(2, 7))
    assert not form.causal and form.rest is not None


def test_chunks_longer_than_the_sequence_vanish() -> None:
    def mask(x: torch.Tensor, chunk: int) -> torch.Tensor:
        i, j = torch.arange(7)[:, None], torch.arange(7)[None, :]
        return (i // chunk == j // chunk) & (j <= i)

    assert describe(read(lambda x: mask(x, 8), ids(2, 7))) == "causal"
    assert read(lambda x: mask(x, 4), ids(2, 7)).rest is not None


def test_transposed_and_permuted_views() -> None:
    mask = lambda x: torch.ones(9, 7, dtype=torch.bool).triu(1).T & x.permute(1, 0)[None, None]
    form = read(mask, flags(9, 7))
    assert (form.causal, form.offset) == (True, -1) and form.rest is not None


# ---------------------------------------------------------------------------------------------- symbolic


def test_symbolic_sizes_with_a_cache() -> None:
    """offset = keys - queries, as in decoding with a growing cache."""
    mask = lambda p, x: library_mask(p, x.shape[1], p.shape[1], offset=p.shape[1] - x.shape[1], window=4)
    form = read(mask, flags(3, 9), ids(3, 5), symbolic=True)
    assert form.causal and form.offset == form.sizes[3] - form.sizes[2]
    assert form.window == 4 and form.rest is None and form.key_padding is not None


def test_symbolic_sizes_keep_a_long_window() -> None:
    mask = lambda p: library_mask(p, p.shape[1], p.shape[1], window=4096)
    form = read(mask, flags(2, 9), symbolic=True)
    assert (form.causal, form.window, form.rest) == (True, 4096, None)


def test_symbolic_bidirectional() -> None:
    def mask(p: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(p.shape[0], p.shape[1], p.shape[1])
        return ((i >= 0) & p[b, j]).expand(p.shape[0], -1, p.shape[1], p.shape[1])

    form = read(mask, flags(2, 9), symbolic=True)
    assert not form.causal and form.rest is None and form.key_padding is not None


def test_symbolic_tensor_offset() -> None:
    mask = lambda p, x, n: library_mask(p, x.shape[1], p.shape[1], offset=n)
    form = read(mask, flags(3, 9), ids(3, 5), torch.tensor(2), symbolic=True)
    assert form.causal and form.offset == 0 and form.offset_tensor is not None


# -------------------------------------------------------------------------------------- refusals, faults


def test_refusals_say_why() -> None:
    assert "dtype torch.int64" in reason(lambda x: x, ids(2, 7), sizes=(1, 1, 2, 7))
    assert "mask rank 5 > 4" in reason(lambda x: x[None, None, None], flags(2, 7), sizes=(1, 1, 2, 7))
    assert "neither 1 nor 8" in reason(lambda x: x, flags(2, 7), sizes=(1, 1, 2, 8))
    nothing = lambda x: torch.zeros(2, 7, dtype=torch.bool)
    assert "hides every key" in reason(nothing, ids(2, 7), sizes=(1, 1, 2, 7))


def test_too_large_to_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_STATIC", 48)
    said = reason(lambda x: torch.ones(7, 7, dtype=torch.bool).tril(), ids(2, 7), sizes=(1, 1, 7, 7))
    assert said == "mask of 49 elements > 48: too large to probe"


FAULTS: dict[str, Callable[[MaskForm], MaskForm]] = {
    "offset": lambda form: replace(form, offset=1),
    "not causal": lambda form: replace(form, causal=False),
    "window": lambda form: replace(form, window=4),
    "no window": lambda form: replace(form, window=None),
    "no padding": lambda form: replace(form, key_padding=None),
    "padding for all": lambda form: replace(form, key_padding=AtLeast(KEY - 1)),
    "rest": lambda form: replace(form, rest=AtLeast(QUERY - 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("symbolic", [False, True])
def test_a_wrong_form_is_caught_by_the_probe(fault: str, symbolic: bool) -> None:
    mask = lambda p: library_mask(p, p.shape[1], p.shape[1], window=3)
    form = read(mask, flags(2, 9), symbolic=symbolic)
    assert probe.disagreement(form) is None
    wrong = probe.disagreement(FAULTS[fault](form))
    assert wrong is not None and wrong.startswith("probe disagrees at (b, h, i, j) = ")


def test_a_wrong_window_is_caught_past_its_length_only() -> None:
    """At the captured size (9) a window of 4096 and none are the same: literals choose the probe's sizes."""
    form = read(lambda p: library_mask(p, p.shape[1], p.shape[1], window=4096), flags(2, 9), symbolic=True)
    for wrong in (None, 4095, 4097):
        assert "probe disagrees" in (probe.disagreement(replace(form, window=wrong)) or "")


def test_a_wrong_fill_is_caught() -> None:
    form = read(lambda p: torch.where(library_mask(p, 7, 7), 0.0, MIN), ids(2, 7))
    assert "probe disagrees" in (probe.disagreement(replace(form, additive_fill=None)) or "")


def test_a_wrong_sort_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole road: a sorter that reads `j <= i` as `j <= i + 1` yields a reason, not a form."""
    monkeypatch.setattr(
        "graphopt.masks.classification.sorted_form",
        lambda keep, empty, space: replace(sorted_form(keep, empty, space), offset=1),
    )
    said = reason(lambda x: torch.ones(7, 7, dtype=torch.bool).tril(), ids(2, 7), sizes=(1, 1, 7, 7))
    assert said == "probe disagrees at (b, h, i, j) = (0, 0, 0, 1)"


# ----------------------------------------------------------------------------------------------- sharing


def test_layers_that_share_a_mask_share_its_reading_and_its_tensors() -> None:
    gm = traced(lambda p: p[:, None, None, 1:8] & torch.ones(7, 7, dtype=torch.bool).tril(), [flags(2, 9)])
    known: dict = {}
    made: dict = {}
    first = classify(mask_node(gm), (2, 3, 7, 7), known)
    again = classify(mask_node(gm), (2, 3, 7, 7), known)
    assert first is again and isinstance(first, MaskForm)
    assert arguments(first, made) is arguments(first, made)


def test_terms_are_decided_by_the_sizes() -> None:
    keys = sympy.Symbol("k", integer=True, positive=True)
    space = Space((sympy.Integer(2), sympy.Integer(1), sympy.Integer(5), keys))
    assert at_least(QUERY, space) == all_of()
    assert at_least(space.sizes[3] - 1 - KEY, space) == all_of()
    assert at_least(QUERY - 5, space) != at_least(QUERY - 4, space)


# ----------------------------------------------------------------------------------------- real programs


def forms_in(gm: fx.GraphModule, known: dict, made: dict) -> list[str]:
    """The forms of the masks of a captured program, one a layer; their tensors are made in the graph."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    found = []
    for node in list(gm.graph.nodes):
        mask = None
        if g.is_call(node, sdpa):
            mask, sizes = g.arg(node, "attn_mask"), (*g.shape(node.args[0])[:-1], g.shape(node.args[1])[-2])
        elif g.is_call(node, torch.ops.aten.softmax.int):
            scores = node.args[0]
            while not g.is_call(scores, torch.ops.aten.add.Tensor):
                scores = scores.args[0]
            mask, sizes = scores.args[1], g.shape(node)
        if mask is None:
            continue
        form = classify(mask, sizes, known)
        assert isinstance(form, MaskForm), form
        arguments(form, made)
        found.append(describe(form))
    gm.graph.lint()
    return found


def kinds(text: str) -> str:
    """A description without names: `causal(offset) & window(4) & padding`."""
    text = re.sub(r"causal\(offset=[^&]*\)(?= &|$| \()", "causal(offset)", text)
    text = re.sub(r"(not )?\w+[\[(]b, j[^&]*?[\])]( == 0)?(?= &|$| \()", "padding", text)
    return text.replace(f" (hidden: {MIN})", " (mean)")


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("kind", "cache", "expected"),
    [
        ("LlamaConfig", "none", [["causal & padding"]]),
        ("LlamaConfig", "static", [["causal & padding"], ["causal(offset) & padding"]]),
        ("MistralConfig", "none", [["causal & window(4) & padding"]]),
        ("Gemma2Config", "none", [["causal & window(4) & padding (mean)", "causal & padding (mean)"]]),
    ],
)
def test_masks_of_real_programs(
    kind: str, cache: str, expected: list[list[str]], dynamic: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=12,
        intermediate_size=20, vocab_size=31, max_position_embeddings=64, sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    graphs: list[list[str]] = []

    def backend(gm: fx.GraphModule, examples: Sequence[object], **_: object) -> Callable[..., object]:
        captured = from_dynamo(gm, examples)
        canonicalize(captured.gm)
        known: dict = {}
        texts = forms_in(captured.gm, known, {})
        assert len(known) == len(set(texts))  # layers share
        graphs.append([kinds(t) for t in dict.fromkeys(texts)])
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    tokens, padding = torch.randint(3, 31, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    padding[0, :2] = 0
    past = transformers.StaticCache(config=config, max_cache_len=11) if cache == "static" else None
    with torch.no_grad():
        compiled(tokens, attention_mask=padding, past_key_values=past, use_cache=past is not None)
        if past is not None:
            longer = torch.cat([padding, padding[:, -1:]], 1)
            compiled(tokens[:, :1], attention_mask=longer, past_key_values=past, use_cache=True)
    if dynamic:  # how many graphs Dynamo makes, and of which steps, is its own affair
        assert {text for texts in graphs for text in texts} <= {text for texts in expected for text in texts}
        assert graphs
    else:
        assert graphs == expected
