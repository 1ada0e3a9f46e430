"""What a launcher would launch for a target: run it on fake tensors, and collect what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphopt import torch_private
from graphopt.launch import Launch, recording
from graphopt.targets import Target


def launches_of(
    launcher: Callable[..., object], arguments: Sequence[object], target: Target
) -> tuple[Launch, ...]:
    """The launches of `launcher(*arguments)`, in order; nothing runs and no data is read.

    Tensors may be real or fake; fakes must be of one mode.
    """
    mode = torch_private.fake_mode_of(arguments) or torch_private.new_fake_mode()
    fakes = torch_private.faked(arguments, mode)
    with mode, recording(target) as recorder:
        launcher(*fakes)
    return tuple(recorder.launches)
