"""How the demo prints: a line for each claim as soon as it is known, and which of them failed."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


@dataclass
class Show:
    """Prints lines as they become known and remembers which checks failed."""

    console: Console = field(default_factory=_console)
    failed: list[str] = field(default_factory=list)

    def title(self, text: str) -> None:
        """A section's headline."""
        self.console.print()
        self.console.print(Rule(Text(text, style="bold"), align="left", style="dim"))

    def check(self, name: str, ok: bool, text: str) -> None:
        """A claim that may fail."""
        if not ok:
            self.failed.append(name)
        self._line("✓" if ok else "✗", "green" if ok else "bold red", name, text)

    def note(self, name: str, text: str) -> None:
        """A figure that is no claim."""
        self._line("·", "dim", name, text)

    def _line(self, mark: str, style: str, name: str, text: str) -> None:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=1)
        line.add_column(width=11, no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(Text(mark, style=style), Text(name, style="bold"), Text(text))
        self.console.print(Padding(line, (0, 0, 0, 1)))
