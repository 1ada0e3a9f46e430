"""How a command ends: our own errors become one line and an exit status."""

from __future__ import annotations

from collections.abc import Callable

import typer

from graphopt.errors import GraphoptError


def or_error(run: Callable[[], None]) -> None:
    """Run; our own errors become one line and exit status 2, anything else keeps its traceback."""
    try:
        run()
    except GraphoptError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
