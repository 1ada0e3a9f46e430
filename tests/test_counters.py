"""Counters start at zero, are shared by the launches of a stream, and are given away for good to captures."""

from __future__ import annotations

import torch

from graphopt import torch_private
from graphopt.counters import Counters, counters

CPU = torch.device("cpu")


def test_launches_of_a_stream_share_zeros_that_grow() -> None:
    held = Counters(CPU)
    first = held.take(7)
    assert first.numel() >= 7 and first.dtype == torch.int32 and not first.any()
    assert held.take(3) is first
    more = held.take(first.numel() + 1)
    assert more.numel() > first.numel() and not more.any()
    assert held.take(7) is more


def test_captured_launches_share_nothing_and_stay_aligned() -> None:
    held = Counters(CPU, reserve=torch.zeros(Counters.RESERVED, dtype=torch.int32))
    parts = [held._captured(n) for n in (1, 5, 8)]
    for part in parts:
        part += 1
    assert held.reserve is not None and int(held.reserve.max()) == 1
    assert [p.storage_offset() % 4 for p in parts] == [0, 0, 0]
    assert [p.numel() for p in parts] == [4, 8, 8]


def test_a_capture_without_reserve_makes_its_own() -> None:
    held = Counters(CPU)
    assert not held._captured(6).any() and held._captured(6).numel() >= 6
    held.reserve = torch.zeros(Counters.RESERVED, dtype=torch.int32)
    beyond = held._captured(Counters.RESERVED + 4)
    assert beyond.numel() >= Counters.RESERVED + 4 and held.taken == 0


def test_a_new_reserve_keeps_the_one_that_graphs_write_to() -> None:
    held = Counters(CPU, reserve=torch.zeros(Counters.RESERVED, dtype=torch.int32))
    part, first = held._captured(8), held.reserve
    held._reserve()
    assert held.taken == 0 and held.reserve is not first and held.spent[0] is first
    part += 1
    assert first is not None and int(first.max()) == 1 and not held._captured(8).any()


def test_fakes_get_fakes() -> None:
    with torch_private.new_fake_mode():
        made = counters(torch.empty(2), 5)
    assert isinstance(made, torch_private.FakeTensor) and made.shape == (5,)
    assert not isinstance(counters(torch.empty(2), 5), torch_private.FakeTensor)
