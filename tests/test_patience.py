"""A call that never ends is ended, and one that ends leaves nothing behind."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from graphopt import patience
from graphopt.patience import Overtime, ended_after


def spin() -> None:
    while True:
        pass


def test_a_call_that_spins_is_ended_where_it_is() -> None:
    with pytest.raises(Overtime):
        ended_after(0.05, spin)


def test_one_that_is_swallowed_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "AGAIN", 0.05)
    swallowed: list[Overtime] = []

    def swallows() -> None:
        while len(swallowed) < 3:
            try:
                spin()
            except Overtime as raised:
                swallowed.append(raised)
        spin()

    with pytest.raises(Overtime):
        ended_after(0.05, swallows)
    assert len(swallowed) == 3


def test_a_call_that_ends_is_left_alone() -> None:
    """However near to its time it ends: what was about to be raised is not raised behind it."""
    for _ in range(300):
        with suppress(Overtime):
            ended_after(0.0005, lambda: time.sleep(0.0004))
    until = time.monotonic() + 2 * patience.AGAIN
    while time.monotonic() < until:
        pass
    assert ended_after(60, lambda: 7) == 7
    assert not [t.name for t in threading.enumerate() if t.name.endswith("(end)")], "watches end with calls"


def test_its_own_error_comes_out() -> None:
    def fails() -> None:
        raise KeyError("w")

    with pytest.raises(KeyError, match="w"):
        ended_after(60, fails)


def test_only_its_thread_is_ended() -> None:
    ended: list[str] = []

    def wait() -> None:
        while not ended:
            pass

    def work(name: str, seconds: float) -> None:
        try:
            ended_after(seconds, wait if name == "patient" else spin)
        except Overtime:
            ended.append(name)

    threads = [threading.Thread(target=work, args=args) for args in (("patient", 600), ("spinning", 0.05))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == ["spinning"] and not any(thread.is_alive() for thread in threads)
