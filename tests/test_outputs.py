"""What `torch.compile(backend="graphopt")` may not change: outputs' memory and strides."""

import pytest
import torch
from torch import nn

from tests.eager import as_eager, x34

# ---------------------------------------------------------------------------------------- what outputs share


def the_input(x):
    return x


def view_of_the_input(x):
    return x.view(-1)


def views_of_the_input(x):
    return x[1], x.t(), x.unsqueeze(0), x.view(2, 6)[:, 1:]


def written_input(x):
    return x.add_(1)


def copy_of_the_input(x):
    return x.clone(), x.contiguous(), x + 0


def copies_apart(x):
    return x.clone(), x.clone()


def equal_results(x):
    return x * 2, x * 2  # two memories, though one value


def one_result_twice(x):
    y = x * 2
    return y, y


def result_and_its_view(x):
    y = x * 2
    return y, y[0], y.t()


def result_and_its_copy(x):
    y = x * 2
    return y, y.clone(), y.t().contiguous()


def no_cast(x):
    return x.to(torch.float32), x.float(), x.type_as(x), x.to(torch.float32, copy=True)


def written_view_and_base(x):
    y = x * 2
    v = y[0]
    v.add_(1)
    return y, v


def written_view_alone(x):
    y = x * 2
    v = y[:, 1:3]
    v.add_(1)
    return v


def written_result_and_its_view(x):
    y = x * 2
    y.add_(1)
    return y, y[0], y.t()


def split_results(x):
    a, b = (x * 2).split(2, dim=1)
    return a, b


def reshape_that_copies(x):
    return x.t().reshape(-1), x.reshape(-1)


def constant_returned(x):
    return x + 1, torch.tensor([1.0, 2.0]), torch.zeros(2)


def same_zeros_returned(x):
    return torch.zeros(3), torch.zeros(3), torch.ones_like(x), torch.ones_like(x)


def same_arange_returned(x):
    return torch.arange(4), torch.arange(4), x[torch.arange(3)]


def nested_outputs(x):
    return {"a": [x + 1, (x, None)], "b": 3, "c": 2.5, "d": "text"}


def no_outputs(x):
    x.mul_(2)


def numbers(x):
    return x.shape[0], x.dim(), 2.5, True, None, x.sum()


def from_nothing(x):
    return torch.ones(2, 3), 1


ALIASES = [
    *(the_input, view_of_the_input, views_of_the_input, written_input, copy_of_the_input, copies_apart),
    *(
        equal_results,
        one_result_twice,
        result_and_its_view,
        result_and_its_copy,
        no_cast,
        written_view_and_base,
    ),
    *(
        written_result_and_its_view,
        written_view_alone,
        split_results,
        reshape_that_copies,
        constant_returned,
        same_zeros_returned,
    ),
    *(same_arange_returned, nested_outputs, numbers, from_nothing),
]


@pytest.mark.parametrize("program", ALIASES, ids=lambda f: f.__name__)
def test_outputs_share_memory_as_in_eager(program) -> None:
    as_eager(program, x34(), graphs=None)


def test_no_outputs() -> None:
    as_eager(no_outputs, x34())


# ------------------------------------------------------------------------------------------------- strides


def permuted(x):
    return (x * 2).permute(2, 0, 1), torch.relu(x.transpose(0, 2)), x.transpose(1, 2) * 2


def contiguous_again(x):
    return (x * 2).permute(2, 0, 1).contiguous(), x.transpose(0, 1).contiguous() + 1


def through_a_linear(x):
    return nn.functional.linear(x.transpose(0, 1), torch.ones(5, x.shape[-1])).transpose(1, 2)


def expanded(x):
    return (x * 2)[:, :1].expand(-1, 3, -1), x.new_ones(()).expand(2, 3)


def strided(x):
    return (x * 2)[:, ::2], (x + 1)[..., -1], (x - 1)[1:, 1:, 1:]


def stepped_after_contiguous(x):
    return (x * 2).transpose(0, 2).contiguous()[:, ::2]


def summed(x):
    return x.transpose(0, 2).sum(1), x.mean(dim=(0, 2), keepdim=True), x.transpose(0, 1).softmax(-1)


def catted(x):
    return torch.cat([x.transpose(0, 1), x.transpose(0, 1) + 1], 0), torch.stack([x.transpose(1, 2)] * 2, 1)


def copied_like(x):
    return torch.empty_like(x.transpose(0, 1)).copy_(x.transpose(0, 1)), x.transpose(0, 1).clone()


def casted(x):
    return x.transpose(0, 2).double(), x.transpose(0, 2).to(
        torch.float64, memory_format=torch.contiguous_format
    )


@pytest.mark.parametrize(
    "program",
    [
        permuted,
        contiguous_again,
        through_a_linear,
        expanded,
        strided,
        stepped_after_contiguous,
        summed,
        catted,
    ]
    + [copied_like, casted],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 1)], ids=str)
def test_outputs_have_eagers_strides(program, shape: tuple[int, ...]) -> None:
    as_eager(program, torch.randn(shape))


def test_channels_last_stays() -> None:
    image = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last)

    def program(x, weight):
        y = nn.functional.conv2d(x, weight, padding=1)
        return (
            y,
            y.relu(),
            (x * 2).contiguous(),
            x.contiguous(memory_format=torch.channels_last) + 1,
            x.clone(),
        )

    as_eager(program, image, torch.randn(3, 3, 3, 3), exact=False, strict=False)
