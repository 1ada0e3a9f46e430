"""What other tests left behind goes."""

from __future__ import annotations

import gc

import torch

from graphopt import backend


def forget() -> None:
    """No compiled code, prepared weights or reports of other tests.

    The only form of a released weight outlives a refresh: it ends with its model, which may wait for Python's
    collector.
    """
    torch.compiler.reset()
    backend.STORE.refresh()
    if len(backend.STORE):
        gc.collect()
        backend.STORE.refresh()
    backend.clear_reports()
