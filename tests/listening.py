"""An observer that keeps all that it hears."""

from __future__ import annotations

from graphopt.observe import Event, Matched, Refused, Warned


class Listener:
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)

    @property
    def reasons(self) -> list[str]:
        return [e.refusal.reason for e in self.events if isinstance(e, Refused)]

    @property
    def ids(self) -> list[str]:
        return [e.match.id for e in self.events if isinstance(e, Matched)]

    @property
    def warnings(self) -> list[str]:
        return [e.message for e in self.events if isinstance(e, Warned)]
