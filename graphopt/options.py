"""The options of `torch.compile(backend="graphopt", options={...})`, `optimize` and `enable`: plain, comparable values."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.errors import OptionError

TARGETS = ("cpu",)


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        strict: raise instead of falling back to the original program.
        merge: make one linear of Q, K, V, and of gate and up.
        target: what to compile for.
    """

    strict: bool = False
    merge: bool = True
    target: str = "cpu"

    @staticmethod
    def parse(given: Mapping[str, object] | None) -> Options:
        """Check options by name, type and value.

        Raises:
            OptionError: an unknown name or value, with the nearest right one.
        """
        given = given or {}
        fields = {f.name: f for f in dataclasses.fields(Options)}
        for name, value in given.items():
            if name not in fields:
                raise OptionError(f"graphopt has no option {name!r}; {_nearest(str(name), tuple(fields))}")
            wanted = type(fields[name].default)
            if not isinstance(value, wanted):
                raise OptionError(f"option {name!r} is {value!r}; it takes a {wanted.__name__}, as {fields[name].default!r}")
        options = Options(**given)  # type: ignore[arg-type]  # checked above
        if options.target not in TARGETS:
            raise OptionError(f"option 'target' is {options.target!r}; {_nearest(options.target, TARGETS)}")
        return options


def _nearest(word: str, known: tuple[str, ...]) -> str:
    """`did you mean 'strict'?`, or all that there is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(repr, known))}"
