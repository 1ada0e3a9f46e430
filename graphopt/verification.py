"""What verification found, for the report: how many rewrites were judged, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TakenBack:
    """A rewrite that gave other numbers, and all that were like it.

    Attributes:
        rule, module_path, source: what was rewritten and where: the first of them.
        matches: the ids of all of them, which are denied.
        error: root mean square error of the new subgraph against the old one in fp64.
        expected: the same of the old subgraph in its own dtype.
        limit: what the accuracy rule allows for `error`.
        reason: the rule's, or the error that the new subgraph raised.
    """

    rule: str
    module_path: str
    source: str
    matches: tuple[str, ...]
    error: float
    expected: float
    limit: float
    reason: str

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> TakenBack:
        """From JSON, where tuples are lists."""
        return cls(**_tuples(fields))

    def __str__(self) -> str:
        line = self.source.split(" ", 1)[0]
        place = (self.module_path or "the graph") + (f" ({line})" if line else "")
        more = f" and {len(self.matches) - 1} more like it" if len(self.matches) > 1 else ""
        return f"{self.rule} at {place}{more}: {self.reason}"


@dataclass(frozen=True)
class NotVerified:
    """A rewrite that nobody has judged, and why; `matches` are the ids of all that are like it."""

    rule: str
    module_path: str
    matches: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.module_path or 'the graph'}: {self.reason}"


RIGHT, CERTIFIED, WRONG, NOT_JUDGED = "right", "by certificate", "wrong", "not judged"


@dataclass(frozen=True)
class Whole:
    """What running the whole graph beside the original has shown: its outputs and the inputs it writes.

    Attributes:
        state: "right", "by certificate", "wrong" (the original runs instead) or "not judged".
        where: the tensor nearest to its limit, as "outputs[0]".
        error, expected, limit: as in `TakenBack`.
        reason: why it is wrong or was not judged.
    """

    state: str
    where: str = ""
    error: float = 0.0
    expected: float = 0.0
    limit: float = 0.0
    reason: str = ""

    def sentence(self) -> str:
        """What is wrong, and what to do."""
        return (
            "the graph as a whole gives other numbers, though each rewrite that was judged is right: "
            f"{self.reason}; error {self.error:.3g}, expected {self.expected:.3g}; `graphopt bisect`, with "
            "verify off, finds which passes or rewrites it is"
        )

    def __str__(self) -> str:
        if self.state in (WRONG, NOT_JUDGED):
            return f"{self.state}: {self.reason}"
        if not self.where:
            return self.state
        return f"{self.state}: {self.where} has rmse {self.error:.3g}, {self.limit:.3g} is allowed"


@dataclass(frozen=True)
class Verification:
    """The account of one graph. Rewrites that did the same (identical layers) count once.

    Attributes:
        mode: "first" or "always".
        judged: rewrites that were run, as old and as new, in the last call that verified.
        certified: those that an earlier run had found right.
        applied: how many matches and kernels all of these stand for.
        taken_back: in the order in which they were found.
        not_verified: for want of budget, or because they cannot be run apart.
        made_up: weights that random numbers stood for: their own were released.
        seconds: spent, over all calls.
        whole: what became of the graph as a whole; None until it has been called.
    """

    mode: str
    judged: int = 0
    certified: int = 0
    applied: int = 0
    taken_back: tuple[TakenBack, ...] = ()
    not_verified: tuple[NotVerified, ...] = ()
    made_up: tuple[str, ...] = ()
    seconds: float = 0.0
    whole: Whole | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Verification:
        """From JSON, where tuples are lists."""
        whole = Whole(**fields["whole"]) if fields.get("whole") is not None else None
        taken = tuple(TakenBack.read(t) for t in fields.get("taken_back", ()))
        left = tuple(NotVerified(**_tuples(n)) for n in fields.get("not_verified", ()))
        return cls(**{**_tuples(fields), "taken_back": taken, "not_verified": left, "whole": whole})

    def __str__(self) -> str:
        made_up = f", on {len(self.made_up)} made-up weight(s)" if self.made_up else ""
        return (
            f"{self.judged} rewrite(s) judged, {self.certified} by certificate, {len(self.taken_back)} taken "
            f"back, {len(self.not_verified)} not verified{made_up}, {1000 * self.seconds:.0f} ms"
        )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
