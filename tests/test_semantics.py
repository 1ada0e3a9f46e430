"""What `torch.compile(backend="graphopt")` may not change: outputs' memory and strides, randomness, modes,
arguments.
"""

import pytest
import torch
from torch import nn

from tests.eager import as_eager, falls_back

aten = torch.ops.aten


def x34() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4) - 5.5


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


# ---------------------------------------------------------------------------------------------- randomness


def two_rands(x):
    return torch.rand(3, 4) + x, torch.rand(3, 4) + x


def drop_twice(x):
    a, b = nn.functional.dropout(x, 0.5), nn.functional.dropout(x, 0.5)
    return a, b, a + b


def unused_rand(x):
    torch.rand(5)  # it still moves the generator on
    return x + torch.randn_like(x)


def random_between_writes(x):
    x.add_(torch.rand(4))
    x[0].normal_()
    x.mul_(torch.rand_like(x))
    return torch.bernoulli(x.sigmoid()), torch.randint(0, 10, (3,))


def attention_dropout(x):
    q = x.view(1, 1, 3, 4)
    return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)


def no_dropout(x):
    return nn.functional.dropout(x, 0.5, training=False), nn.functional.dropout(x, 0.0)


@pytest.mark.parametrize(
    "program",
    [two_rands, drop_twice, unused_rand, random_between_writes, attention_dropout, no_dropout],
    ids=lambda f: f.__name__,
)
def test_random_numbers_are_eagers(program) -> None:
    as_eager(program, x34(), strict=False)


def test_a_model_in_training_mode_drops_as_eager() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
    ).train()
    as_eager(model, torch.randn(5, 4), exact=False)


# ---------------------------------------------------------------------------------------------------- modes


def no_grad_inside(x):
    with torch.no_grad():
        y = x * 2
    return y + 1


def inference_mode_inside(x):
    with torch.inference_mode():
        y = x * 2
    return x + 1, y + 1


def grad_mode_set_inside(x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = x * 2
    torch.set_grad_enabled(before)
    with torch.set_grad_enabled(False):
        z = x * 3
    return y + z


def autocast_disabled_inside(x):
    with torch.autocast("cpu", enabled=False):
        return x @ x.t()


@pytest.mark.parametrize(
    "program",
    [no_grad_inside, inference_mode_inside, grad_mode_set_inside, autocast_disabled_inside],
    ids=lambda f: f.__name__,
)
def test_modes_inside(program) -> None:
    as_eager(program, x34(), strict=False)


def test_inference_mode_around() -> None:
    def program(x):
        y = x * 2
        x.add_(y)
        return y, x

    compiled = torch.compile(program, backend="graphopt", options={"strict": True})
    with torch.inference_mode():
        for _ in range(2):
            mine, eagers = x34(), x34()
            y, same = compiled(mine)
            want, _ = program(eagers)
            assert same is mine and torch.equal(mine, eagers) and torch.equal(y, want)


# ------------------------------------------------------------------------------------------------ arguments


def test_keyword_only_and_awkward_names() -> None:
    def program(x, /, *, out, self=None, input=2, args=None):
        return x * input + out, self, args

    as_eager(program, (x34(),), {"out": x34(), "self": None, "args": x34()})
    as_eager(lambda out, input: torch.add(out, input).mul_(out), x34(), x34())


def test_a_module_with_an_argument_named_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4)

        def forward(self, out: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return self.out(out) + other

    as_eager(Model().eval(), x34(), x34(), exact=False)


def test_more_than_64_arguments() -> None:
    as_eager(lambda *xs: (sum(xs[1:], xs[0]), xs[70] * 2), *(torch.full((2,), float(i)) for i in range(80)))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 4), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_empty_and_single_sizes(shape: tuple[int, int], dynamic: bool) -> None:
    def program(x, weight):
        h = nn.functional.linear(x, weight).softmax(-1)
        return (
            h,
            h.sum(0),
            x.t().reshape(-1),
            x.mean(-1, keepdim=True).expand_as(x),
            x.unsqueeze(1).squeeze(1),
        )

    as_eager(program, torch.randn(shape), torch.randn(5, shape[1]), dynamic=dynamic, exact=False)


def test_sizes_change_between_calls() -> None:
    def program(x, y):
        z = torch.cat([x, y], 0)
        return z[1:-1], z.view(-1, 2), z.shape[0], x[: y.shape[0] // 2], z.split(z.shape[0] - 1)[1]

    compiled = torch.compile(program, backend="graphopt", options={"strict": True}, dynamic=True)
    with torch.no_grad():
        for n, m in ((3, 5), (4, 2), (7, 7)):
            x, y = torch.randn(n, 4), torch.randn(m, 4)
            for got, want in zip(compiled(x, y), program(x, y), strict=True):
                assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def test_a_graph_break_between_writes() -> None:
    def program(x):
        x.add_(1)
        if x.sum() > 0:  # data-dependent: Dynamo breaks the graph here
            return x.mul_(2)
        return x - 1

    as_eager(program, x34(), graphs=2)
    torch.compiler.reset()
    as_eager(program, x34() + 100, graphs=None)


# --------------------------------------------------------------------------------------- buffers and
# parameters


class Statistics(nn.Module):
    """Running statistics written by hand, as a parameter's value is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.count += 1
        with torch.no_grad():
            self.weight.data.mul_(0.5)
        return (x - self.mean) * self.weight / self.count


def test_buffers_and_parameters_written_in_the_graph() -> None:
    eager, mine = Statistics(), Statistics()
    compiled = torch.compile(mine, backend="graphopt", options={"strict": True})
    with torch.no_grad():
        for i in range(3):
            x = torch.randn(5, 4) + i
            torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=0)
            for (name, got), want in zip(mine.state_dict().items(), eager.state_dict().values(), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)


def test_batch_norm() -> None:
    model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3)).eval()
    model[1].running_mean.fill_(0.3)
    as_eager(model, torch.randn(2, 4, 5), exact=False, strict=False)


def test_batch_norm_in_training_mode_falls_back() -> None:
    """Its operator writes to the running statistics, and its schema does not say so."""
    eager, mine = nn.BatchNorm1d(4).train(), nn.BatchNorm1d(4).train()
    compiled = torch.compile(mine, backend="graphopt")
    x = torch.randn(6, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="running statistics"):
        torch.testing.assert_close(compiled(x), eager(x))
    assert torch.equal(mine.running_mean, eager.running_mean) and mine.num_batches_tracked == 1


# ----------------------------------------------------------------------------------------------- custom
# operators

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
