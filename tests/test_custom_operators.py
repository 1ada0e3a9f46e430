"""Operators that nothing is known of are barriers, and what writes one memory by two ways falls back."""

import pytest
import torch

from tests.eager import as_eager, falls_back, x34

LIBRARY = torch.library.Library("graphopt_test", "FRAGMENT")


def library_op(schema: str, function, result=lambda *args: None) -> None:
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt_test::{name}", result, lib=LIBRARY, allow_override=True)


def _increment(x, by):
    x.add_(by)


def _fill_pair(a, b, value):
    a.fill_(value)
    b.fill_(value + 1)


def _scale_and_sum(x, factor):
    x.mul_(factor)
    return x.sum()


library_op("increment_(Tensor(a!) x, int by) -> ()", _increment)


library_op("fill_pair(Tensor(a!) a, Tensor(b!) b, float value) -> ()", _fill_pair)


library_op(
    "scale_and_sum(Tensor(a!) x, float factor) -> Tensor", _scale_and_sum, lambda x, factor: x.new_empty(())
)


def barrier(x):
    before = x * 2
    torch.ops.graphopt_test.increment_(x, 3)
    return before, x * 2


def barrier_on_a_view(x):
    y = x + 1
    torch.ops.graphopt_test.increment_(y[1], 3)
    torch.ops.graphopt_test.increment_(y[:, 1:3], 10)
    return y, x


def barrier_on_two(x, y):
    z = x + y
    torch.ops.graphopt_test.fill_pair(x[0], y, 4.0)
    return z, x + y


def barrier_with_a_result(x):
    total = torch.ops.graphopt_test.scale_and_sum(x, 2.0)
    return total + x, torch.ops.graphopt_test.scale_and_sum(x, 2.0)


def unread_barrier(x):
    torch.ops.graphopt_test.increment_(x, 1)


@pytest.mark.parametrize(
    "program", [barrier, barrier_on_a_view, barrier_with_a_result, unread_barrier], ids=lambda f: f.__name__
)
def test_an_unknown_writing_operator_is_a_barrier(program) -> None:
    as_eager(program, x34())


def test_an_operator_that_writes_two_arguments() -> None:
    as_eager(barrier_on_two, x34(), x34() * 3)


def test_writing_two_views_of_one_memory_falls_back() -> None:
    def program(x):
        torch.ops.graphopt_test.fill_pair(x[0], x[1], 4.0)
        return x + 1

    falls_back(program, x34(), why="two arguments that share memory")
