"""The options of `torch.compile(..., options={...})`, `optimize` and `enable`: plain, comparable values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from graphopt import targets
from graphopt.errors import OptionError
from graphopt.expect import operators


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        strict: raise instead of falling back to the original program.
        merge: make one linear of Q, K, V, and of gate and up.
        target: what to compile for; "auto" is the device of the first input.
        cuda_graphs: run GPU programs from a CUDA graph where that is safe.
        shard: how many processes share the weights and the work, one rank each (`graphopt.runtime.ranks`).
        shard_plan: how weights of these names are shared, as {"layers.*.mlp.down_proj": "rowwise"} or Hugging
            Face's `base_model_tp_plan`; what it leaves open, data flow decides (`graphopt.sharding.plan`).
        quantize: "int8" keeps the linears' weights in 8 bits; None leaves them as they are.
        quantize_group: how many inputs share a scale; it has to divide the inputs of each quantized linear.
        expect: how often operators have to be recognised at least, as {"attention": 32, "norm": 65}, in each
            graph that is compiled; fewer are an error before anything runs (`graphopt.expect`).
        quantize_exclude: names of weights or modules that stay as they are, as `lm_head`, `layers.0` or
            `*.down_proj`; see `graphopt.passes.quantize.Quantize`.
        verify: run each rewrite as old and as new subgraph on the program's own values and take back what
            gives other numbers, then the whole program beside the original, which runs where the whole gives
            others: "first" once, at the first call, with certificates that later starts trust; "always" every
            match at every call; "off" not at all (`graphopt.verify`, `graphopt.whole`).
        verify_seconds: the time that verification may take in a call, in seconds.
        verify_mebibytes: the memory that it may take, in MiB.
    """

    strict: bool = False
    merge: bool = True
    target: str = "auto"
    cuda_graphs: bool = True
    shard: int = 1
    shard_plan: tuple[tuple[str, str], ...] = ()
    quantize: str | None = None
    quantize_group: int = 64
    quantize_exclude: tuple[str, ...] = ()
    expect: tuple[tuple[str, int], ...] = ()
    verify: str = "off"
    verify_seconds: int = 60
    verify_mebibytes: int = 2048

    @staticmethod
    def parse(given: Mapping[str, object] | None) -> Options:
        """Check options by name, type and value.

        Raises:
            OptionError: an unknown name or value, with the nearest right one; options that contradict.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise OptionError(f"options is {given!r}; it takes a dict, as {{'strict': True}}")
        for name in given:
            if name not in VALUES:
                raise OptionError(f"graphopt has no option {name!r}; {_nearest(str(name), tuple(VALUES))}")
        read = {name: VALUES[name].read(name, value) for name, value in given.items()}
        options = Options(**read)  # type: ignore[arg-type]  # checked above
        if options.shard_plan and options.shard == 1:
            raise OptionError("option 'shard_plan' does nothing alone; give the number of ranks, as shard=2")
        if options.quantize is None:
            for name in ("quantize_group", "quantize_exclude"):
                if getattr(options, name) != VALUES[name].default:
                    raise OptionError(f"option {name!r} does nothing alone; give quantize='int8' with it")
        if options.verify == "off":
            for name in ("verify_seconds", "verify_mebibytes"):
                if getattr(options, name) != VALUES[name].default:
                    raise OptionError(f"option {name!r} does nothing alone; give verify='first' with it")
        return options


class Values(Protocol):
    """What an option takes."""

    @property
    def default(self) -> object:
        """The value where none is given."""

    def read(self, name: str, value: object) -> object:
        """The value as `Options` keeps it. Raises OptionError for one that is not taken."""


@dataclass(frozen=True)
class OneOf:
    """One of a few values, the default first."""

    known: tuple[object, ...]

    @property
    def default(self) -> object:
        """The first."""
        return self.known[0]

    def read(self, name: str, value: object) -> object:
        """The value itself."""
        if not any(type(value) is type(k) and value == k for k in self.known):  # 1 is not True
            raise OptionError(f"option {name!r} is {value!r}; {_nearest(str(value), self.known)}")
        return value


@dataclass(frozen=True)
class Whole:
    """A whole number, 1 or more."""

    default: int

    def read(self, name: str, value: object) -> object:
        """The value itself."""
        if type(value) is not int or value < 1:  # True is no number here
            raise OptionError(f"option {name!r} is {value!r}; it takes a whole number, 1 or more")
        return value


@dataclass(frozen=True)
class Names:
    """Any number of names: a tuple, or a list of them; none by default."""

    default: tuple[str, ...] = ()

    def read(self, name: str, value: object) -> object:
        """The names as a tuple, which is comparable."""
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) and v for v in value):
            raise OptionError(f"option {name!r} is {value!r}; it takes a tuple of names, as ('lm_head',)")
        return tuple(value)


@dataclass(frozen=True)
class Pairs:
    """Names and what is wanted for each: a dict, or pairs; none by default."""

    default: tuple[tuple[str, str], ...] = ()

    def read(self, name: str, value: object) -> object:
        """The pairs as a tuple, which is comparable."""
        pairs = tuple(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, (tuple, list)) or not all(map(_is_pair, pairs)):
            raise OptionError(f"option {name!r} is {value!r}; it takes a dict, as {{'lm_head': 'colwise'}}")
        return tuple((key, wanted) for key, wanted in pairs)


def _is_pair(value: object) -> bool:
    """Whether a value is two words."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, str) for v in value)


@dataclass(frozen=True)
class Counts:
    """Names of operators and how many of each: a dict, or pairs; none by default."""

    default: tuple[tuple[str, int], ...] = ()

    def read(self, name: str, value: object) -> object:
        """The pairs as a sorted tuple, which is comparable."""
        pairs = tuple(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, (tuple, list)) or not all(map(_is_count, pairs)):
            raise OptionError(
                f"option {name!r} is {value!r}; it takes a dict of whole numbers, as {{'attention': 32}}"
            )
        known = operators()
        wrong = next((op for op, _ in pairs if op not in known), None)
        if wrong is not None:
            raise OptionError(f"option {name!r} has no operator {wrong!r}; {_nearest(wrong, known)}")
        return tuple(sorted((op, number) for op, number in pairs))


def _is_count(value: object) -> bool:
    """Whether a value is a word and a whole number, 0 or more."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return isinstance(value[0], str) and type(value[1]) is int and value[1] >= 0


VALUES: Mapping[str, Values] = {
    "strict": OneOf((False, True)),
    "merge": OneOf((True, False)),
    "target": OneOf(("auto", *targets.NAMES)),
    "cuda_graphs": OneOf((True, False)),
    "shard": Whole(1),
    "shard_plan": Pairs(),
    "quantize": OneOf((None, "int8")),
    "quantize_group": Whole(64),
    "quantize_exclude": Names(),
    "expect": Counts(),
    "verify": OneOf(("off", "first", "always")),
    "verify_seconds": Whole(60),
    "verify_mebibytes": Whole(2048),
}


def _nearest(word: str, known: Sequence[object]) -> str:
    """`did you mean 'strict'?`, or all that there is."""
    by_text = {str(k).lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_text, n=1)
    return f"did you mean {by_text[close[0]]!r}?" if close else f"known are {', '.join(map(repr, known))}"
