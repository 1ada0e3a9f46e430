"""Events of a compilation and those who listen: passes never print, time or dump; observers do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import fx

if TYPE_CHECKING:
    from graphopt.rewrite import Match, Refusal


@dataclass(frozen=True)
class PassStarted:
    """A pass is about to run on `gm`."""

    name: str
    index: int
    gm: fx.GraphModule


@dataclass(frozen=True)
class PassEnded:
    """A pass has run; `changed` is computed by fingerprint, `seconds` is the pass alone."""

    name: str
    index: int
    gm: fx.GraphModule
    changed: bool
    seconds: float


@dataclass(frozen=True)
class Matched:
    """A rule's match was applied."""

    match: Match


@dataclass(frozen=True)
class Refused:
    """A rule's nearest miss at a place, or a pass's refusal, with its reason."""

    refusal: Refusal


@dataclass(frozen=True)
class KernelChosen:
    """Lowering chose `kernel` for a node; `reasons` are the refusals of the kernels tried before."""

    node: str
    op: str
    kernel: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Warned:
    """Something that the user should know: it is also an entry of the report."""

    message: str


Event: TypeAlias = "PassStarted | PassEnded | Matched | Refused | KernelChosen | Warned"


class Observer(Protocol):
    """Anything that listens to a compilation. It may read the graph in an event, never edit it."""

    def on_event(self, event: Event) -> None: ...


def emit(observers: Sequence[Observer], event: Event) -> None:
    """Tell every observer."""
    for observer in observers:
        observer.on_event(event)
