"""What a user may lay down: weights by name pattern, and how each is shared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.errors import ShardError

# How a linear (or an embedding) is shared -> what we do. Hugging Face's words for it are rows too.
STYLES: Mapping[str, str] = {
    "colwise": "column",  # output features; what follows goes on with a part of them
    "colwise_rep": "gathered",  # Hugging Face before 5.0
    "colwise_gather_output": "gathered",
    "rowwise": "row",  # input features; the results are summed
    "rowwise_rep": "row",
    "rowwise_split_input": "row",
    "embedding_rowwise": "vocabulary",
    "vocabulary": "vocabulary",
    "replicated": "replicated",
    "replicate": "replicated",
    "auto": "auto",
}
# Words of Hugging Face's plans for what is decided by data flow here: norms, routers, experts, sums, and a
# table shared by columns, whose rows have to be gathered again.
DECIDED_HERE = re.compile(
    r"sequence_parallel|gather|embedding_colwise|(local_|packed_|moe_|ep_|grouped_|mla_).*|(.*_)?all_?reduce"
)

Plan = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Pinned:
    """A plan, checked: (pattern, expression, style) of each row."""

    rows: tuple[tuple[str, re.Pattern[str], str], ...] = ()
    met: set[str] = field(default_factory=set)  # the patterns that some weight has

    @staticmethod
    def parse(plan: Plan) -> Pinned:
        """Check a plan's words.

        Raises:
            ShardError: a style that does not exist.
        """
        rows = []
        for pattern, style in plan.items() if isinstance(plan, Mapping) else plan:
            if style not in STYLES and not DECIDED_HERE.fullmatch(style):
                raise ShardError(
                    f"plan: {pattern!r} is {style!r}; known are {', '.join(dict.fromkeys(STYLES))}"
                )
            rows.append((pattern, _expression(pattern), STYLES.get(style, "auto")))
        return Pinned(tuple(rows))

    def style(self, names: Iterable[str], where: str) -> str:
        """How the plan wants the weight (or weights, where several were merged) of these names to be shared.

        Raises:
            ShardError: two rows want it differently.
        """
        wanted: dict[str, str] = {}
        for name in names:
            module = name.rpartition(".")[0]
            for pattern, expression, style in self.rows:
                if expression.search(module) or expression.search(name):
                    self.met.add(pattern)
                    wanted.setdefault(style, f"{pattern!r} wants {name} {style}")
        if len(wanted) > 1:
            raise ShardError(f"{where}: the plan contradicts itself: {' and '.join(wanted.values())}")
        return next(iter(wanted), "auto")

    def unmet(self) -> tuple[str, ...]:
        """The patterns that no weight asked for so far has."""
        return tuple(
            pattern for pattern, _, style in self.rows if style != "auto" and pattern not in self.met
        )


def _expression(pattern: str) -> re.Pattern[str]:
    """`layers.*.q_proj` fits the end of a dotted name; `*` is one word of it."""
    words = [r"[^.]+" if word == "*" else re.escape(word) for word in pattern.split(".")]
    return re.compile(rf"(?:^|\.){'[.]'.join(words)}$")
