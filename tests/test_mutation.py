"""In-place calls in every order: results, mutated inputs and aliasing are eager's, and nothing falls back."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from graphopt.capture import capture
from graphopt.defaults import pipeline
from graphopt.errors import CaptureRefused
from tests import in_place, written_views
from tests.eager import as_eager, compare, falls_back, x34
from tests.programs import Program, programs

MUTATIONS = [*in_place.CASES, *written_views.CASES]


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: case[0].__name__)
def test_mutation(case: tuple) -> None:
    as_eager(*case)


SYMBOLIC = [
    in_place.written_between_reads,
    in_place.swapped_and_returned,
    in_place.rows_assigned,
    in_place.strided_rows_assigned,
    written_views.view_of_view_written,
    written_views.base_read_after_view_written,
    written_views.split_pieces_written,
    written_views.chunks_written,
    written_views.transpose_written,
    written_views.matrix_transpose_written,
    written_views.narrow_written,
    written_views.reshaped_written,
    written_views.diagonal_written,
    in_place.index_copied,
    in_place.masked_filled_view,
    in_place.copied_with_broadcast_and_cast,
    written_views.idle_dropout_of_intermediate_written,
    written_views.idle_dropout_of_input_written,
    written_views.idle_dropouts_written,
]


@pytest.mark.parametrize(
    "case", [c for c in MUTATIONS if c[0] in SYMBOLIC], ids=lambda case: case[0].__name__
)
def test_mutation_under_symbolic_sizes(case: tuple) -> None:
    as_eager(*case, dynamic=True)


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(programs(size=10))
def test_random_programs_lowered(program: Program) -> None:
    """Through the whole pipeline: strides, too, are eager's."""
    try:
        compiled, _ = pipeline().run(capture(program, *program.arguments()))
    except CaptureRefused as refused:
        assert "expand" in refused.reason, refused.reason
        return
    with torch.no_grad():
        compare(program, compiled, tuple(program.arguments()))


# ------------------------------------------------------------------------------------------------ refused
# writes


def strided_written(x):
    x.as_strided((2, 3), (4, 1), 1).add_(50)
    return x * 2


def strided_read_after_write(x):
    v = x.as_strided((2, 3), (4, 1), 1)
    x.add_(1)
    return v * 2


def sizes_changed(x):
    y = x + 1
    y.unsqueeze_(0)
    return y


def one_of_two_views_of_the_same_memory(x, y):
    x.add_(1)
    return y * 2


def test_writes_that_are_no_values_fall_back() -> None:
    falls_back(strided_written, x34(), why="as_strided")
    falls_back(strided_read_after_write, x34(), why="as_strided")
    falls_back(sizes_changed, x34(), why="unsqueeze_ changes a tensor's sizes")
    x = x34()
    falls_back(one_of_two_views_of_the_same_memory, x, x.t(), why="two inputs share the memory")


def test_a_write_through_expand_falls_back() -> None:
    """Eager itself refuses most of them; it lets through what writes one value everywhere."""

    def program(x):
        x[:1].expand(3, 4).fill_(2.0)
        return x + 1

    try:
        program(x34())
    except RuntimeError as error:
        compiled = torch.compile(program, backend="graphopt")
        with torch.no_grad(), pytest.raises(RuntimeError, match=str(error)[:40]):
            compiled(x34())
    else:
        falls_back(program, x34(), why="expand")


def test_views_of_one_memory_are_read_together() -> None:
    x = x34()
    as_eager(lambda a, b, c: (a + b.t(), c.add_(1)), x, x.t(), x34())
