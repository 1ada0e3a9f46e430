"""Masks that are added, and what of a mask stays a tensor."""

from __future__ import annotations

import pytest
import torch

from graphopt.masks import arguments, describe
from tests.mask_reading import INF, MIN, Mask, flags, ids, indices, library_mask, read

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
    assert describe(read(lambda x: mask(x, 4), ids(2, 7))) == "causal & chunks of 4"


def test_chunks_of_rows_that_start_late() -> None:
    def mask(start: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(2, 7, 7)
        return ((i - start[b]) // 3 == (j - start[b]) // 3) & (j <= i)

    form = read(mask, torch.tensor([0, 2]))
    assert describe(form) == "causal & chunks of 3" and form.rest is not None
    assert arguments(form).bias is not None


def test_blocks_of_a_packed_batch() -> None:
    def mask(block: torch.Tensor) -> torch.Tensor:
        b, i, j = indices(2, 7, 7)
        return (block[b, i] == block[b, j]) & (j <= i)

    form = read(mask, ids(2, 7))
    assert describe(form).startswith("causal & blocks of ") and form.rest is not None


@pytest.mark.parametrize("rounding", ["trunc", None])
def test_another_division_is_no_chunk(rounding: str | None) -> None:
    def mask(x: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(7)[:, None], torch.arange(7)[None, :]
        return torch.div(i - 3, 4, rounding_mode=rounding) == torch.div(j - 3, 4, rounding_mode=rounding)

    assert "chunks" not in describe(read(mask, ids(2, 7)))


@pytest.mark.parametrize("low", [MIN, -1e30])
def test_the_floor_under_an_additive_mask(low: float) -> None:
    """-inf becomes the floor: a row without keys is then a mean."""

    def mask(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        return torch.zeros(7, 7).masked_fill(hidden, float("-inf")).clamp_min(low)

    form = read(mask, ids(2, 7))
    assert form.causal and form.additive_fill == torch.tensor(low).item() and form.bias is None


def test_transposed_and_permuted_views() -> None:
    mask = lambda x: torch.ones(9, 7, dtype=torch.bool).triu(1).T & x.permute(1, 0)[None, None]
    form = read(mask, flags(9, 7))
    assert (form.causal, form.offset) == (True, -1) and form.rest is not None
