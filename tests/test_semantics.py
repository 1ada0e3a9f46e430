"""What `torch.compile(backend="graphopt")` may not change: randomness, modes, arguments, written buffers."""

import pytest
import torch
from torch import nn

from tests.eager import as_eager, x34

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
