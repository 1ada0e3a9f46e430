"""Boolean masks are read for what they mean: causal, windows, padding, in static and symbolic sizes."""

from __future__ import annotations

import pytest
import torch

from graphopt import graph as g
from graphopt.masks import MaskForm, arguments, classify, describe
from tests.mask_reading import (
    Mask,
    assert_same_mask,
    flags,
    ids,
    indices,
    library_mask,
    mask_node,
    read,
    traced,
)

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
