"""In-place calls in every order: results, mutated inputs and aliasing are eager's, and nothing falls back."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.nn import functional as F

from graphopt.capture import capture
from graphopt.defaults import pipeline
from graphopt.errors import CaptureRefused
from tests.eager import as_eager, compare, falls_back
from tests.programs import Program, programs


def x34() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4) - 5.5


def ints(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 7


def written_before_read(x):
    x.add_(1)
    return x * 2


def written_after_read(x):
    y = x * 2
    x.add_(1)
    return y


def written_between_reads(x):
    y = x * 2
    x.add_(1)
    return y + x * 2, x * 2  # `x * 2` before is not `x * 2` after


def swapped(x, y):
    old = x.clone()
    x.copy_(y)
    y.copy_(old)


def swapped_and_returned(x, y):
    old = x.clone()
    x.copy_(y)
    y.copy_(old)
    return old, x + y


def rotated(x, y, z):
    a, b, c = x.clone(), y.clone(), z.clone()
    x.copy_(b), y.copy_(c), z.copy_(a)
    return a, c


def copy_kept(x):
    old = x.clone()
    x.add_(1)
    return old


def copies_kept(x):
    first = x.clone()
    x.mul_(2)
    second = x.contiguous().clone()
    x.mul_(2)
    return first, second, x.clone()


def view_of_copy_kept(x):
    old = x.clone().t()
    x.add_(1)
    return old


def chained(x, y):
    return x.add_(1).mul_(y).sub_(3).relu_()


def added_to_ints(n, x):
    n.add_(3).mul_(2)
    x.add_(n)  # int64 to float
    return n // 2


def float_result_into_half(h, x):
    h.add_(x)  # promotes to float, stored as half
    return h * 2


def index_put(x, i):
    x[i] = 7.0
    x[i, 1] += x[i, 2]
    return x.sum()


def index_put_accumulate(x, i, v):
    return x.index_put_((i,), v, accumulate=True)


def rows_assigned(x):
    x[1:3] = x[0:2] * 10
    return x + 0


def rows_assigned_scalar(x):
    x[1:3] = 4
    x[:, -1] = -1
    x[0, 0] = 9
    return x.t()


def strided_rows_assigned(x):
    x[::2, 1::2] = x[::2, ::2] - 1
    return x[::2]


def overlapping_rows_assigned(x):
    x[1:] = x[:-1].clone()
    return x


def bool_mask_assigned(x):
    x[x > 0] = 0.5
    return x


def masked_filled(x):
    return x.masked_fill_(x > 0, -1.0) + 1


def masked_filled_view(x):
    x[:2].masked_fill_(x[1:] > 0, -1.0)
    return x * 1.5


def copied_with_broadcast_and_cast(x, n):
    x.copy_(n)
    return x


def copied_onto_itself_transposed(x):
    x.copy_(x.t().clone())
    return x + 1


def copied_onto_itself_flipped(x):
    x.copy_(x.flip(0))
    return x


def copied_onto_itself(x):
    x.copy_(x)
    return x * 2


def index_copied(x, i, v):
    x.index_copy_(0, i, v)
    return x.sum(0), x


def index_added_and_filled(x, i, v):
    x.index_add_(0, i, v)
    x.index_fill_(1, i, 3.0)
    return x


def scattered(x, i, v):
    x.scatter_(1, i, v)
    x.scatter_add_(1, i, v)
    return x


def zeroed(x):
    y = x + 1
    x.zero_()
    return y, x + 1


def filled(x):
    x.fill_(2.5)
    x[0].zero_()
    return x


def filled_with_tensor(x):
    x.fill_(x.sum())
    return x


def clamped(x):
    return x.clamp_(-2, 2).neg_().abs_().sqrt_().exp_()


def activations(x):
    return nn.functional.silu(nn.functional.relu(x, inplace=True), inplace=True)


def view_of_view_written(x):
    x[1:][0].view(2, 2)[1].add_(10)
    return x


def view_of_intermediate_written(x):
    y = x * 2
    y[1:][0].add_(10)
    return y


def base_read_after_view_written(x):
    v = x.view(-1)
    w = x[0]
    v[2:6].mul_(10)
    return x + 0, w + 0, v + 0


def view_read_after_base_written(x):
    v, t = x.view(-1)[2:6], x.t()
    x.mul_(10)
    return v + 0, t + 0


def view_read_after_other_view_written(x):
    even, row = x[:, ::2], x[1]
    row.add_(100)
    first = even * 1.0
    even.neg_()
    return first, row + 0, x + 0


def split_pieces_written(x):
    a, b = x.split([1, 3], dim=1)
    a.add_(1)
    b[:, 1].mul_(5)
    return x + a


def chunks_written(x):
    for i, piece in enumerate(x.chunk(2, dim=-1)):
        piece.mul_(i + 2)
    return x.sum(0)


def unbound_rows_written(x):
    for i, row in enumerate(x.unbind(0)):
        row.add_(i)
    return x


def split_of_intermediate_written(x):
    y = x + 1
    a, b = y.split(2, dim=1)
    a.copy_(b)
    b.zero_()
    return y, a


def diagonal_written(x):
    x.diagonal().fill_(9)
    x.diagonal(1).add_(1)
    return x


def transpose_written(x):
    x.t().add_(torch.arange(3.0))
    x.transpose(0, 1)[1].zero_()
    return x


def matrix_transpose_written(x):
    x.mT[0].add_(torch.arange(3.0))
    x.T.mul_(torch.arange(12.0).view(4, 3))
    return x


def permuted_written(x):
    x.view(3, 2, 2).permute(2, 0, 1)[1].mul_(3)
    x.view(3, 2, 2).movedim(-1, 0)[0].add_(torch.arange(6.0).view(3, 2))
    return x


def swapped_axes_written(x):
    x.swapaxes(0, 1).sub_(torch.arange(12.0).view(4, 3))
    return x


def reshaped_written(x):
    x.reshape(2, 6)[1].add_(5)
    x.flatten().unsqueeze(0).squeeze(0).unflatten(0, (4, 3))[1].mul_(2)
    return x


def narrow_written(x):
    x.narrow(1, 1, 2).mul_(4)
    return x


def unfolded_written(x):
    x.view(-1).unfold(0, 3, 3)[1].mul_(7)
    return x


def bits_written(x):
    x.view(torch.int32)[0].zero_()
    return x + 1


def expanded_same_size_written(x):
    x.expand(3, 4).add_(1)
    x.expand_as(x).mul_(2)
    return x


def contiguous_alias_written(x):
    x.contiguous().add_(1)  # x itself: it is contiguous
    x.to(torch.float32).mul_(2)
    x.t().contiguous().mul_(100)  # a copy
    return x


def detached_written(x):
    x.detach().add_(1)
    x.data.mul_(2)
    return x


def idle_dropout_of_intermediate_written(x, y):
    z = x + 1
    kept = F.dropout(z, 0.1, training=False)  # z itself
    kept *= y
    return kept, z * 2


def idle_dropout_of_input_written(x):
    F.dropout(x, 0.1, training=False).add_(1)
    F.dropout(x.t()[1:], 0.0, training=True).mul_(3)  # nothing to drop
    x.sub_(2)
    return F.dropout(x[1], 0.1, training=False)


def idle_dropouts_written(x):
    F.alpha_dropout(x, 0.1, training=False).add_(1)
    F.feature_alpha_dropout(x, 0.1, training=False).mul_(2)
    torch.feature_dropout(x, 0.1, False).sub_(3)
    F.rrelu(x, training=False).add_(100)  # a copy
    F.dropout(x, 0.1, training=False, inplace=True).mul_(2)
    return x + 1


def out_argument(x, y):
    torch.add(x, 1, out=y)
    torch.mul(y, 2, out=x)
    return y - x


def random_in_place(x):
    x[0].uniform_()
    x[1:].normal_()
    return x * 2


def both_views_of_written(x):
    x.add_(1)
    return x[0], x[1:], x.t()


def zeros_written_apart(x):
    k, v = torch.zeros(3, 4), torch.zeros(3, 4)
    k[1] = x[0]
    v[2] = x[1]
    return k, v


def zeros_index_copied(x, i, v):
    k, w = x.new_zeros(3, 4), torch.zeros_like(x)
    return k.index_copy_(0, i, v), w.index_copy_(0, i, v * 2)


def loop_of_writes(x):
    for i in range(1, 3):
        x[i] += x[i - 1]
    return x


I2, V2 = torch.tensor([2, 0]), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
MUTATIONS = [
    (written_before_read, x34()),
    (written_after_read, x34()),
    (written_between_reads, x34()),
    (swapped, x34(), x34() * 3),
    (swapped_and_returned, x34(), x34() * 3),
    (rotated, x34(), x34() * 3, x34() * 5),
    (copy_kept, x34()),
    (copies_kept, x34()),
    (view_of_copy_kept, x34()),
    (chained, x34(), torch.arange(4.0)),
    (added_to_ints, ints(3, 4), x34()),
    (float_result_into_half, x34().half(), x34() / 3),
    (index_put, x34(), I2),
    (index_put_accumulate, x34(), torch.tensor([1, 1]), V2),
    (rows_assigned, x34()),
    (rows_assigned_scalar, x34()),
    (strided_rows_assigned, x34()),
    (overlapping_rows_assigned, x34()),
    (bool_mask_assigned, x34()),
    (masked_filled, x34()),
    (masked_filled_view, x34()),
    (copied_with_broadcast_and_cast, x34(), ints(4)),
    (copied_onto_itself_transposed, x34()[:, :3].clone()),
    (copied_onto_itself_flipped, x34()),
    (copied_onto_itself, x34()),
    (index_copied, x34(), I2, V2),
    (index_added_and_filled, x34(), I2, V2),
    (scattered, x34(), ints(2, 3) % 4, V2),
    (zeroed, x34()),
    (filled, x34()),
    (filled_with_tensor, x34()),
    (clamped, x34()),
    (activations, x34()),
    (view_of_view_written, x34()),
    (view_of_intermediate_written, x34()),
    (base_read_after_view_written, x34()),
    (view_read_after_base_written, x34()),
    (view_read_after_other_view_written, x34()),
    (split_pieces_written, x34()),
    (chunks_written, x34()),
    (unbound_rows_written, x34()),
    (split_of_intermediate_written, x34()),
    (diagonal_written, x34()),
    (transpose_written, x34()),
    (matrix_transpose_written, x34()),
    (permuted_written, x34()),
    (swapped_axes_written, x34()),
    (reshaped_written, x34()),
    (narrow_written, x34()),
    (unfolded_written, x34()),
    (bits_written, x34()),
    (expanded_same_size_written, x34()),
    (contiguous_alias_written, x34()),
    (detached_written, x34()),
    (idle_dropout_of_intermediate_written, x34(), x34()),
    (idle_dropout_of_input_written, x34()),
    (idle_dropouts_written, x34()),
    (out_argument, x34(), x34()),
    (random_in_place, x34()),
    (both_views_of_written, x34()),
    (zeros_written_apart, x34()),
    (zeros_index_copied, x34(), I2, V2),
    (loop_of_writes, x34()),
]


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: case[0].__name__)
def test_mutation(case: tuple) -> None:
    as_eager(*case)


SYMBOLIC = [
    *(
        written_between_reads,
        swapped_and_returned,
        rows_assigned,
        strided_rows_assigned,
        view_of_view_written,
    ),
    *(
        base_read_after_view_written,
        split_pieces_written,
        chunks_written,
        transpose_written,
        matrix_transpose_written,
    ),
    *(
        narrow_written,
        reshaped_written,
        diagonal_written,
        index_copied,
        masked_filled_view,
        copied_with_broadcast_and_cast,
    ),
    *(idle_dropout_of_intermediate_written, idle_dropout_of_input_written, idle_dropouts_written),
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
