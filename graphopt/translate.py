"""A translation: one torch operator that is one of our ops under another name. No pattern needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from graphopt.torch_private import OpOverload

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
    target: OpOverload
    op: OpOverload
    arguments: Arguments
