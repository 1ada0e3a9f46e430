"""What the zoo says of one type: rows of its table, as values that JSON keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

SHOWN = ("norm", "attention", "mlp", "rope", "experts")  # what the tables have a column for
NEAR = 3  # near misses told of a type that is not recognised completely
TOKENS = 2  # of a decoding: one from the prompt's call, one from a call with the cache


@dataclass
class Run:
    """One dtype and padding. Of several calls and graphs, the counts are the sums over the first call.

    Attributes:
        graphs: how many the compiler made; `recompiled` of them at a second, equal call.
        found: what was recognised, by the names of census.OPS_OF.
        unmatched: op name -> share (0..1) of the FLOPs in heavy work outside the vocabulary.
        refused: why a graph ran as it was written, or could not be judged.
        wrong: what broke the accuracy rule, or an exception at run time.
        matched: rule -> matches.
        misses: rule -> its nearest miss, of the rules that came furthest.
        places: rule -> where it matched first, in the order of matching; of a thorough run only.
        judged: how many graphs ran beside their fp64 oracle.
        handed_back: how many graphs graphopt refused as a whole: the original runs.
        tokens: of a greedy decoding, the tokens that are equal to eager's.
        ends: why Dynamo broke the program into several graphs, and where.
    """

    graphs: int = 0
    recompiled: int = 0
    judged: int = 0
    handed_back: int = 0
    tokens: int = 0
    found: dict[str, int] = field(default_factory=dict)
    unmatched: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    matched: dict[str, int] = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether nothing is wrong, and every graph was judged or is the original."""
        made = self.graphs + self.recompiled
        return not self.wrong and self.judged + self.handed_back == made > 0


@dataclass
class Row:
    """One type: why it could not be built or run in eager, or what is there and what each run found.

    Attributes:
        decoded: a greedy decoding of a padded prompt in fp32, with the type's own cache: `generate`, whose
            first call is the prompt and each further call a token. Its counts are those of all calls.
        undecoded: why a type that writes text was not decoded: what eager raises.
    """

    type: str
    group: str
    broken: str | None = None
    there: dict[str, int] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    decoded: Run | None = None
    undecoded: str | None = None
    seconds: float = 0.0
    """CPU time, all runs together."""

    @property
    def right(self) -> bool:
        """Whether it builds and all runs are right."""
        return self.broken is None and bool(self.runs) and all(run.right for run in self.every().values())

    def every(self) -> dict[str, Run]:
        """All runs by their names, the decoding too."""
        return self.runs | ({"float32 decoded": self.decoded} if self.decoded else {})

    def found(self, what: str) -> int:
        """How many of a kind every run recognised, no more than there are."""
        return min([self.there.get(what, 0), *(run.found.get(what, 0) for run in self.runs.values())])

    def missing(self) -> list[str]:
        """The columns of which some run recognised less than there is."""
        return [what for what in SHOWN if self.found(what) < self.there.get(what, 0)]

    def near(self) -> list[str]:
        """What came nearest to what is missing: near misses of rules, and where Dynamo broke the program."""
        run = self._shortest()
        near = [f"{rule} {miss}" for rule, miss in list(run.misses.items())[:NEAR]]
        return [*near, *(f"graph break: {text}" for text in run.ends[:NEAR])]

    def _shortest(self) -> Run:
        """The run that recognised least of what is missing."""
        missing = self.missing()
        found = lambda run: sum(min(run.found.get(what, 0), self.there[what]) for what in missing)
        return min(self.runs.values(), key=found, default=Run())

    def short(self) -> Row:
        """The row with its runs as one: what all of them found, what any of them broke.

        Of the rules only the near misses stay, where something is missing.
        """
        runs = tuple(self.runs.values())
        if not runs:
            return self
        whole = Run(
            graphs=max(run.graphs for run in runs),
            recompiled=max(run.recompiled for run in runs),
            found={what: min(run.found.get(what, 0) for run in runs) for what in runs[0].found},
            unmatched=max((run.unmatched for run in runs), key=lambda shares: sum(shares.values())),
            refused=list(dict.fromkeys(text for run in runs for text in run.refused)),
            wrong=list(dict.fromkeys(text for run in runs for text in run.wrong)),
        )
        if self.missing():
            shortest = self._shortest()
            whole.misses, whole.ends = dict(list(shortest.misses.items())[:NEAR]), shortest.ends[:NEAR]
        whole.handed_back = max(run.handed_back for run in runs)
        if self.right:
            whole.judged = whole.graphs + whole.recompiled - whole.handed_back
        decoded = self.decoded
        if decoded:
            decoded = replace(decoded, found={}, unmatched={}, matched={}, misses={}, places={}, ends=[])
        return replace(self, runs={" / ".join(self.runs): whole}, decoded=decoded)

    def to_dict(self) -> dict[str, object]:
        """The row as plain values, without those that are empty; `from_dict` reads it back."""
        values = {key: value for key, value in asdict(self).items() if value}
        for name, run in values.get("runs", {}).items():
            values["runs"][name] = {key: value for key, value in run.items() if value}
        if "decoded" in values:
            values["decoded"] = {key: value for key, value in values["decoded"].items() if value}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Row:
        """The row that `to_dict` gave."""
        runs, decoded = values.get("runs", {}), values.get("decoded")
        assert isinstance(runs, dict) and (decoded is None or isinstance(decoded, dict))
        made = {
            "runs": {k: Run(**v) for k, v in runs.items()},
            "decoded": Run(**decoded) if decoded else None,
        }
        return cls(**{**values, **made})  # type: ignore[arg-type]  # fields, from JSON
