"""What Dynamo hands the backend: dynamic sizes, many arguments, outputs of all kinds, written inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt import backend
from graphopt.tools.zoo.census import expected_counts, recognised_counts
from tests.block import MERGED, Block, agree, block, counted, example
from tests.calling import compiled
from tests.models import zoo
from tests.tolerances import close

pytestmark = pytest.mark.usefixtures("fresh")


def test_lengths_become_dynamic_by_themselves() -> None:
    model = zoo.model("llama")
    ours = compiled(model)
    lengths = (7, 9, 4, 12, 8)
    for length in lengths:
        given = zoo.inputs(model, zoo.Case(length=length))
        logits = ours(**given, use_cache=False).logits
        close(logits, model(**given).logits, torch.float32)
    assert len(backend.reports()) == 2, "fixed, then dynamic"
    expected = expected_counts(model, **zoo.inputs(model, zoo.Case()))
    assert [recognised_counts(r.counts) for r in backend.reports()] == [expected] * 2


@pytest.mark.parametrize("how", ["dynamic", "mark"])
def test_dynamic_shapes_are_one_graph(how: str) -> None:
    model = block()
    ours = compiled(model, dynamic=True if how == "dynamic" else None)
    for length in (5, 8, 3):
        x = example(length)
        if how == "mark":
            torch._dynamo.mark_dynamic(x, 1)
        agree(ours(x), model(example(length)))
    (report,) = backend.reports()
    assert report.counts["attention"] == 1 and report.counts["linear"] == 7
    assert report.unmatched_share == 0


def test_dynamic_batch_and_length_at_once() -> None:
    model = block()
    ours = compiled(model, dynamic=True)
    for length, batch in ((5, 2), (8, 3), (3, 7)):
        agree(ours(example(length, batch)), model(example(length, batch)))
    assert len(backend.reports()) == 1


def test_more_than_64_arguments() -> None:
    def total(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*(x + i for i, x in enumerate(xs)), sum(xs))

    xs = [torch.randn(3) for _ in range(100)]
    for ours, eager in zip(compiled(total)(*xs), total(*xs), strict=True):
        agree(ours, eager)
    assert len(backend.reports()) == 1


def test_a_model_with_more_than_64_weights() -> None:
    model = nn.Sequential(*(block(seed) for seed in range(10)))
    agree(compiled(model)(example()), model(example()))
    assert len(backend.STORE) == 10 * MERGED


def test_outputs_without_dimensions() -> None:
    model = block()
    ours = compiled(lambda x: (model(x).sum(), x.shape[1], (x > 0).all()))
    total, length, positive = ours(example())
    agree(total, model(example()).sum())
    assert total.shape == positive.shape == () and length == 5 and positive.dtype == torch.bool


def test_inputs_without_dimensions_and_without_tensors() -> None:
    def f(x: torch.Tensor, scale: torch.Tensor, n: int, shift: float, name: str, last: bool) -> torch.Tensor:
        y = x * scale + shift
        return (y**n)[..., -1] if last and name == "a" else y

    ours = compiled(f)
    for args in ((2, 0.5, "a", True), (3, 0.5, "a", True), (2, 1.5, "b", True), (2, 1.5, "a", False)):
        agree(ours(example(), torch.tensor(3.0), *args), f(example(), torch.tensor(3.0), *args))


def test_floats_and_ints_under_dynamic_shapes() -> None:
    def f(x: torch.Tensor, n: int, factor: float) -> torch.Tensor:
        return x[:, :n] * factor + n

    ours = compiled(f, dynamic=True)
    for n, factor in ((3, 0.5), (2, 1.5), (4, 2.5)):
        agree(ours(example(), n, factor), f(example(), n, factor))


def test_a_module_without_parameters() -> None:
    ours = compiled(nn.Sequential(nn.SiLU(), nn.Softmax(-1)))
    with counted() as counts:
        agree(ours(example()), torch.softmax(nn.functional.silu(example()), -1))
    assert counts == {"graphs": 1, "prepared": 0}


def test_outputs_that_are_inputs_weights_or_views_of_them() -> None:
    model = Block()

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, model.q.weight, model.q.weight.t(), x[0], x.transpose(0, 1), x + 1

    x = example()
    for ours, eager in zip(compiled(f)(x), f(x), strict=True):
        assert torch.equal(ours, eager) and ours.stride() == eager.stride()
        if eager.untyped_storage().data_ptr() in (x.data_ptr(), model.q.weight.data_ptr()):
            assert ours.data_ptr() == eager.data_ptr()


def test_nested_inputs_and_outputs() -> None:
    model = block()

    def f(inputs: dict[str, list[torch.Tensor]]) -> dict[str, object]:
        a, b = inputs["xs"]
        return {"y": (model(a), [model(b)]), "none": None}

    ours, eager = compiled(f)({"xs": [example(), example()]}), f({"xs": [example(), example()]})
    agree(ours["y"][0], eager["y"][0])
    agree(ours["y"][1][0], eager["y"][1][0])
    assert ours["none"] is None


def test_inputs_that_are_written() -> None:
    model = block()

    def step(x: torch.Tensor, cache: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, position, model(x))
        position.add_(x.shape[1])
        return cache.sum(1)

    ours = compiled(step)
    state = [(torch.zeros(2, 9, 20), torch.arange(3)) for _ in range(2)]
    for _ in range(3):
        agree(ours(example(3), *state[0]), step(example(3), *state[1]))
        agree(state[0][0], state[1][0])
        assert torch.equal(state[0][1], state[1][1])
    assert len(backend.reports()) == 1


def test_under_inference_mode() -> None:
    model, x = block(), example()
    ours = compiled(model)
    with torch.inference_mode():
        result = ours(x)
    agree(result, model(x))
    agree(ours(x), model(x))
