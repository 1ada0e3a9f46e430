"""A block that never ends is ended, and one that ends leaves nothing behind."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from graphopt.patience import Overtime, ended_after


def spin() -> None:
    while True:
        pass


def test_a_block_that_spins_is_ended_where_it_is() -> None:
    with pytest.raises(Overtime), ended_after(0.05):
        spin()


def test_a_block_that_ends_is_left_alone() -> None:
    """However near to its time it ends: what was about to be raised is not raised behind it."""
    for _ in range(200):
        with suppress(Overtime), ended_after(0.0005):
            pass
    assert sum(range(200_000)) == 19_999_900_000


def test_its_own_error_comes_out() -> None:
    with pytest.raises(KeyError, match="w"), ended_after(60):
        raise KeyError("w")


def test_only_its_thread_is_ended() -> None:
    ended: list[str] = []

    def work(name: str, seconds: float) -> None:
        try:
            with ended_after(seconds):
                while not (name == "patient" and ended):
                    pass
        except Overtime:
            ended.append(name)

    threads = [threading.Thread(target=work, args=args) for args in (("patient", 600), ("spinning", 0.05))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == ["spinning"] and not any(thread.is_alive() for thread in threads)
