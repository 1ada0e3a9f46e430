"""A translation: one torch operator that is one of our ops under another name. No pattern needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        target: torch's operator; or, where it need not exist, its name: `library::operator`.
        op: our operator.
        arguments: our arguments by name from the node's, or why this call cannot be said in our op.
    """

    name: str
    target: OpOverload | str
    op: OpOverload
    arguments: Arguments

    def targets(self, present: Iterable[object]) -> Sequence[object]:
        """Which of the operators that are present it translates."""
        if not isinstance(self.target, str):
            return (self.target,)
        return [t for t in present if isinstance(t, OpOverload) and t._schema.name == self.target]
