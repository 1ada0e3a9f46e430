"""A block of Python that does not end is ended: an error is raised inside it, in its own thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Overtime(BaseException):
    """Raised in a block that has taken too long; no `except Exception` on the way holds it up."""


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raise Overtime in the block where it takes longer; at a line of Python, not inside a call into C.

    Source: `PyThreadState_SetAsyncExc` in Python's C API, which debuggers end threads by.
    """
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    thread, lock, ended = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def end() -> None:
        with lock:
            if not ended:
                raise_in(thread, ctypes.py_object(Overtime))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended = True
        timer.cancel()
        raise_in(thread, None)  # one that was raised at the last moment would come out somewhere else
