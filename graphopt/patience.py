"""A call of Python that does not end is ended: an error is raised inside it, in its own thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")
AGAIN = 1.0  # seconds; what is raised in a finalizer is swallowed by Python


class Overtime(BaseException):
    """Raised in a call that has taken too long; no `except Exception` on the way holds it up."""


def ended_after(seconds: float, call: Callable[[], R]) -> R:
    """The call's result; Overtime is raised in it where it takes longer: at a line of Python, not in C.

    Source: `PyThreadState_SetAsyncExc` in Python's C API, which debuggers end threads by.
    """
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    thread, ended = ctypes.c_ulong(threading.get_ident()), threading.Event()

    def end() -> None:
        wait = seconds
        while not ended.wait(wait):
            raise_in(thread, ctypes.py_object(Overtime))
            wait = AGAIN

    watch = threading.Thread(target=end, daemon=True)
    try:
        try:
            watch.start()
            return call()
        finally:
            ended.set()
    finally:  # once more: what is raised at the last moment may hit the first one
        ended.set()
        watch.join()
        raise_in(thread, None)  # or it would come out somewhere else
