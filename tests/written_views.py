"""Programs that write through views of their inputs and of what they made."""

import torch
from torch.nn import functional as F

from tests.eager import x34


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


# The program, and what it is called with.
CASES = [
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
]
