"""What is out of scope runs the original program under `torch.compile`: right results, one warning, the
reason kept.
"""

import pytest
import torch
from torch import nn

from graphopt import backend
from tests.eager import as_eager, falls_back


def square(n: int = 4) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, n)


def autocast_inside_a_kernel(x):
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.bilinear(x, x, x.expand(2, 4, 4))
    return y, x @ x


def conditional(x):
    return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))


def complex_inside(x):
    return torch.view_as_complex(x.view(-1, 2)).conj().abs()


def sparse_inside(x):
    return torch.sparse.mm(x.to_sparse(), x)


def write_through_expand(x):
    y = torch.zeros(1, 4)
    y.expand(4, 4).select(0, 1).add_(x[0])
    return y


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (autocast_inside_a_kernel, "autocast may cast inside the kernel of aten._trilinear.default; convert"),
        (conditional, "the higher-order operator 'cond' is not supported"),
        (complex_inside, "dtype torch.complex64"),
        (write_through_expand, "a write through aten.expand.default"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_falls_back_with_the_reason(program, why: str) -> None:
    falls_back(program, square(), why=why)


def test_sparse_tensors_are_eagers() -> None:
    """Dynamo itself breaks the graph around them; whatever reaches us is refused, or runs."""
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(sparse_inside, backend="graphopt")(square()), sparse_inside(square())
        )
        got = torch.compile(lambda x: x * 2, backend="graphopt")(square().to_sparse())
    torch.testing.assert_close(got.to_dense(), square() * 2)


def test_flex_attention_falls_back() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    torch.compiler.reset()
    backend.clear_reports()
    with torch.no_grad(), pytest.warns(UserWarning, match="flex_attention"):
        torch.testing.assert_close(
            torch.compile(flex_attention, backend="graphopt")(q, q, q), flex_attention(q, q, q)
        )
    assert "'flex_attention' is not supported" in (backend.reports()[-1].fallback or "")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: torch.randn(3, 3, dtype=torch.complex64),
            "dtype torch.complex64; complex outputs are not supported",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "tensor subclass",
        ),
    ],
    ids=["complex", "subclass"],
)
def test_inputs_of_other_kinds_fall_back(make, why: str) -> None:
    torch.compiler.reset()
    backend.clear_reports()
    x = make()
    with torch.no_grad(), pytest.warns(UserWarning, match="runs the original"):
        got = torch.compile(lambda x: x * 2, backend="graphopt")(x)
    want = x * 2
    assert type(got) is type(want)
    torch.testing.assert_close(
        got.values() if got.is_nested else got, want.values() if want.is_nested else want
    )
    assert why in (backend.reports()[-1].fallback or "")


def test_data_dependent_control_flow_breaks_the_graph() -> None:
    def program(x):
        y = x * 2
        if y.sum() > 0:
            return y + 1
        return y.tolist()

    as_eager(program, torch.ones(3), graphs=2)
    as_eager(program, -torch.ones(3), graphs=None)


def test_execution_on_meta_falls_back() -> None:
    torch.compiler.reset()
    backend.clear_reports()
    with torch.no_grad(), pytest.warns(UserWarning, match="meta device: nothing to run"):
        got = torch.compile(nn.Linear(4, 3, device="meta"), backend="graphopt")(
            torch.empty(2, 4, device="meta")
        )
    assert got.shape == (2, 3) and got.is_meta and "meta" in (backend.reports()[-1].fallback or "")


def test_gradients_that_are_needed_fall_back_and_flow() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    torch.compiler.reset()
    backend.clear_reports()
    with pytest.warns(UserWarning, match=r"torch.no_grad\(\)"):
        torch.compile(model, backend="graphopt")(x).sum().backward()
    assert model.weight.grad is not None and "gradients" in (backend.reports()[-1].fallback or "")


def test_strict_raises_instead() -> None:
    torch.compiler.reset()
    with torch.no_grad(), pytest.raises(Exception, match="'cond' is not supported"):
        torch.compile(conditional, backend="graphopt", options={"strict": True})(square())
