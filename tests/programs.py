"""Random small programs of views, in-place calls and arithmetic, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from hypothesis import strategies as st

Tensor: TypeAlias = torch.Tensor
Step: TypeAlias = "tuple[str, int, int, int]"  # a row of STEPS, two tensors of the pool, a number

# Each takes two tensors of the pool and a small number. What eager refuses (a wrong rank, say) is no step.
VIEWS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "t": lambda x, y, n: x.t(),
    "mT": lambda x, y, n: x.mT,
    "select": lambda x, y, n: x.select(n % x.dim(), n % x.shape[n % x.dim()] - 1),
    "slice": lambda x, y, n: x[n % 2 : 3],
    "slice_last": lambda x, y, n: x[..., n % 2 :: 2],
    "negative_slice": lambda x, y, n: x[-2:],
    "narrow": lambda x, y, n: x.narrow(-1, n % 2, 1),
    "flat": lambda x, y, n: x.reshape(-1),
    "view": lambda x, y, n: x.view(2, -1),
    "unsqueeze": lambda x, y, n: x.unsqueeze(n % 3 - 1),
    "squeeze": lambda x, y, n: x.squeeze(),
    "diagonal": lambda x, y, n: x.diagonal(n % 2),
    "split": lambda x, y, n: x.split(2)[n % 2],
    "chunk": lambda x, y, n: x.chunk(2, -1)[n % 2],
    "unbind": lambda x, y, n: x.unbind(-1)[n % 3 - 1],
    "movedim": lambda x, y, n: x.movedim(0, -1),
    "detach": lambda x, y, n: x.detach(),
    "contiguous": lambda x, y, n: x.contiguous(),
    "expand": lambda x, y, n: x.expand(2, *x.shape),
    "no_cast": lambda x, y, n: x.to(torch.float32),
}
VALUES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "add": lambda x, y, n: x + y,
    "sub": lambda x, y, n: x - n,
    "rsub": lambda x, y, n: n - x,
    "mul": lambda x, y, n: x * y,
    "double": lambda x, y, n: torch.add(x, y, alpha=n),
    "clone": lambda x, y, n: x.clone(),
    "cast": lambda x, y, n: x.double().float(),
    "sum": lambda x, y, n: x.sum(-1),
    "cat": lambda x, y, n: torch.cat([x, y]),
    "greater": lambda x, y, n: (x > y).float(),
    "zeros": lambda x, y, n: torch.zeros_like(x),
    "new": lambda x, y, n: torch.zeros(3, 4),
    "relu": lambda x, y, n: torch.relu(x),
}
WRITES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "add_": lambda x, y, n: x.add_(n),
    "add_tensor_": lambda x, y, n: x.add_(y),
    "mul_": lambda x, y, n: x.mul_(y),
    "sub_alpha_": lambda x, y, n: x.sub_(y, alpha=n),
    "copy_": lambda x, y, n: x.copy_(y),
    "copy_clone_": lambda x, y, n: x.copy_(y.clone()),
    "copy_cast_": lambda x, y, n: x.copy_(y.double()),
    "fill_": lambda x, y, n: x.fill_(n),
    "zero_": lambda x, y, n: x.zero_(),
    "relu_": lambda x, y, n: x.relu_(),
    "set_row": lambda x, y, n: _set(x, n % x.shape[0], y),
    "set_rows": lambda x, y, n: _set(x, slice(1, 3), n),
    "set_where": lambda x, y, n: _set(x, x > n, 0.5),
    "masked_fill_": lambda x, y, n: x.masked_fill_(x > n, 1.0),
    "index_fill_": lambda x, y, n: x.index_fill_(0, torch.tensor([1]), n),
}
# Undefined in eager, too, where what is read is another part of the memory that is written.
OVERLAPPING = ("add_tensor_", "mul_", "sub_alpha_", "copy_", "set_row")
STEPS = {**VIEWS, **VALUES, **WRITES}


def _set(x: Tensor, where: object, value: object) -> Tensor:
    x[where] = value  # type: ignore[index, assignment]  # whatever torch takes
    return x


def _overlap(x: Tensor, y: Tensor) -> bool:
    return x is not y and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Program:
    """Steps over a pool of tensors that begins with the inputs; each step adds its result. Returns some of
    the pool.
    """

    inputs: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def arguments(self) -> list[Tensor]:
        """The inputs, anew."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(-4, 5, shape, generator=generator) / 2 for shape in self.inputs]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it."""
        pool = list(inputs)
        for name, a, b, number in self.steps:
            pool.append(STEPS[name](pool[a % len(pool)], pool[b % len(pool)], number))
        return tuple(pool[i % len(pool)] for i in self.outputs)

    def __str__(self) -> str:
        lines = [f"inputs {self.inputs}"]
        for i, (name, a, b, number) in enumerate(self.steps):
            n = len(self.inputs) + i
            lines.append(f"%{n} = {name}(%{a % n}, %{b % n}, {number})")
        n = len(self.inputs) + len(self.steps)
        return "\n".join([*lines, "return " + ", ".join(f"%{i % n}" for i in self.outputs)])

    __repr__ = __str__

    def valid(self) -> Program:
        """Without the steps that eager refuses."""
        pool, kept = self.arguments(), []
        for step in self.steps:
            name, a, b, number = step
            if name in OVERLAPPING and _overlap(pool[a % len(pool)], pool[b % len(pool)]):
                continue
            try:
                pool.append(STEPS[name](pool[a % len(pool)], pool[b % len(pool)], number))
            except (RuntimeError, IndexError, ZeroDivisionError):
                continue
            kept.append((name, a % (len(pool) - 1), b % (len(pool) - 1), number))
        return Program(self.inputs, tuple(kept), self.outputs)


@st.composite
def programs(draw: st.DrawFn, size: int = 8) -> Program:
    """Programs on one to three inputs, in which every third step or so writes."""
    inputs = draw(st.lists(st.sampled_from([(3, 4), (4, 4), (4,), (1, 4)]), min_size=1, max_size=3))
    names: Sequence[str] = [*VIEWS, *VALUES, *WRITES, *WRITES]
    indices = st.integers(0, 20)
    step = st.tuples(st.sampled_from(names), indices, indices, st.integers(-1, 3))
    steps = draw(st.lists(step, min_size=2, max_size=size))
    outputs = draw(st.lists(indices, min_size=1, max_size=3))
    return Program(tuple(inputs), tuple(steps), tuple(outputs)).valid()
