"""A translation: one torch operator that is one of our ops under another name. No pattern is needed to find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

Arguments: TypeAlias = "Callable[[fx.Node], Mapping[str, object] | str]"


@dataclass(frozen=True)
class Translation:
    """target(...) == op(**arguments(node)), for nodes that are not refused.

    Attributes:
        name: what matches and refusals are reported under.
        target: torch's operator.
        op: our operator.
        arguments: our arguments by name from the node's, or why this call cannot be said in our op.
    """

    name: str
    target: torch._ops.OpOverload
    op: torch._ops.OpOverload
    arguments: Arguments
