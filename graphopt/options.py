"""The options of `torch.compile(..., options={...})`, `optimize` and `enable`: plain, comparable values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt import targets
from graphopt.errors import OptionError


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        strict: raise instead of falling back to the original program.
        merge: make one linear of Q, K, V, and of gate and up.
        target: what to compile for; "auto" is the device of the first input.
        cuda_graphs: run GPU programs from a CUDA graph where that is safe.
    """

    strict: bool = False
    merge: bool = True
    target: str = "auto"
    cuda_graphs: bool = True

    @staticmethod
    def parse(given: Mapping[str, object] | None) -> Options:
        """Check options by name, type and value.

        Raises:
            OptionError: an unknown name or value, with the nearest right one.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise OptionError(f"options is {given!r}; it takes a dict, as {{'strict': True}}")
        for name, value in given.items():
            if name not in VALUES:
                raise OptionError(f"graphopt has no option {name!r}; {_nearest(str(name), tuple(VALUES))}")
            known = VALUES[name]
            if not any(type(value) is type(k) and value == k for k in known):  # 1 is not True
                raise OptionError(f"option {name!r} is {value!r}; {_nearest(str(value), known)}")
        return Options(**given)  # type: ignore[arg-type]  # checked above


# What each option takes, the default first.
VALUES: Mapping[str, tuple[object, ...]] = {
    "strict": (False, True),
    "merge": (True, False),
    "target": ("auto", *targets.NAMES),
    "cuda_graphs": (True, False),
}


def _nearest(word: str, known: Sequence[object]) -> str:
    """`did you mean 'strict'?`, or all that there is."""
    by_text = {str(k).lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_text, n=1)
    return f"did you mean {by_text[close[0]]!r}?" if close else f"known are {', '.join(map(repr, known))}"
