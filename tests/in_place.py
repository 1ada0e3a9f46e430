"""Programs that write to whole tensors, by indices and masks, in every order with reads."""

import torch
from torch import nn

from tests.eager import x34


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
# The program, and what it is called with.
CASES = [
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
    (out_argument, x34(), x34()),
    (random_in_place, x34()),
    (both_views_of_written, x34()),
    (zeros_written_apart, x34()),
    (zeros_index_copied, x34(), I2, V2),
    (loop_of_writes, x34()),
]
