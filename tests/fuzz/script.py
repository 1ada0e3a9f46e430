"""Programs with choices: PyTorch that asks for a spelling here and a size there, drawn once and replayed.

    def attended(s: Script) -> Tensor:
        q, k, v = (s.input(name, 2, 3, 5, 4) for name in "qkv")
        scores = q @ k.transpose(*s.pick("transposed", (-2, -1), (1, 2)))
        return torch.softmax(scores, s.pick("softmax over", -1, 2)) @ v

The first of the options is what models write; the others are what a rule could take for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

V = TypeVar("V")
Choose: TypeAlias = (
    "Callable[[int, bool], int]"  # how many options, whether the first is the usual -> which one
)
Body: TypeAlias = "Callable[[Script], object]"


class NoProgram(Exception):
    """These choices do not run in eager: they are no model."""


class Script(nn.Module):
    """One program: `body` with the choices that `choose` makes while it runs for the first time.

    Attributes:
        chosen: what was picked, by name, in order.
        tensors: the inputs as they were made, by name.
    """

    def __init__(self, body: Body, choose: Choose, dtype: torch.dtype = torch.float32) -> None:
        """Draw the program by running it.

        Raises:
            NoProgram: eager refuses the choices.
        """
        super().__init__()
        self.body, self.choose, self.dtype = body, choose, dtype
        self.chosen: dict[str, int] = {}
        self.said: dict[str, object] = {}
        self.tensors: dict[str, Tensor] = {}
        self.weights = nn.ParameterDict()
        self.given: dict[str, Tensor] | None = None
        self.random = torch.Generator().manual_seed(7)
        try:
            with torch.no_grad():
                body(self)
        except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise NoProgram(str(error)) from error
        self.inputs = tuple(self.tensors.values())

    def forward(self, *given: Tensor) -> object:
        """The drawn program on other inputs of the same shapes."""
        self.given = dict(zip(self.tensors, given, strict=True))
        try:
            return self.body(self)
        finally:
            self.given = None

    def pick(self, name: str, *options: V) -> V:
        """One of the options, the same at each run."""
        return self._choice(name, options, True)

    def vary(self, name: str, *options: V) -> V:
        """One of the options, all of which are usual; the same at each run."""
        return self._choice(name, options, False)

    def input(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor from outside: normal numbers; coin flips that keep the first column, for bool."""
        if self.given is not None:
            return self.given[name]
        if name not in self.tensors:
            self.tensors[name] = self._made(shape, dtype or self.dtype)
        return self.tensors[name]

    def weight(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of the program: normal numbers over the square root of the last size."""
        if name not in self.weights:
            value = self._made(shape, dtype or self.dtype) / max(shape[-1], 1) ** 0.5
            self.weights[name] = nn.Parameter(value, requires_grad=False)
        return self.weights[name]

    def __str__(self) -> str:
        picks = ", ".join(f"{name}: {value!r}" for name, value in self.said.items())
        sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in self.tensors.items())
        return f"{self.body.__name__}({self.dtype}; {picks}; {sizes})"

    def _choice(self, name: str, options: Sequence[V], first: bool) -> V:
        if name not in self.chosen:
            self.chosen[name] = self.choose(len(options), first)
            self.said[name] = said(options, self.chosen[name])
        return options[self.chosen[name]]

    def _made(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:
            flips = torch.rand(tuple(shape), generator=self.random) < 0.6
            flips[..., :1] = True
            return flips
        return torch.randn(tuple(shape), generator=self.random).to(dtype)


def said(options: Sequence[object], index: int) -> object:
    """How a choice is printed: a tensor or a function by its number."""
    option = options[index]
    return option if isinstance(option, (str, int, float, tuple, torch.dtype, type(None))) else f"#{index}"


def by_seed(seed: int) -> Choose:
    """Choices of a random number generator: the usual option, but for none to a fifth of the time."""
    chance = random.Random(seed)
    faults = chance.choice((0.0, 0.05, 0.1, 0.2))
    return lambda n, first: 0 if first and chance.random() >= faults else chance.randrange(n)


@st.composite
def choices(draw: st.DrawFn) -> Choose:
    """Choices that hypothesis draws and shrinks towards the usual option."""
    unusual = st.integers(0, 7).map(lambda x: x == 7)

    def choose(n: int, first: bool) -> int:
        return 0 if n == 1 or (first and not draw(unusual)) else draw(st.integers(0, n - 1))

    return choose
