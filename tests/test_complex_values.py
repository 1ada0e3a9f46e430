"""Complex numbers inside of a graph: what passes through is right, what may not is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt import backend
from graphopt.accuracy import raise_to_fp64
from graphopt.capture import capture
from graphopt.complex_values import KNOWN
from graphopt.errors import CaptureRefused
from graphopt.flops import flops
from graphopt.passes.canonicalize import canonicalize
from tests.eager import as_eager
from tests.tolerances import close

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("emptied")


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """A rope as some models write it; x [batch, heads, length, head_dim], angle [length, head_dim / 2]."""
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z * turn).flatten(3).type_as(x)


def turned_in_fp64(x: Tensor, angle: Tensor) -> Tensor:
    """The same in real numbers."""
    a, b, c, s = x[..., ::2].double(), x[..., 1::2].double(), angle.double().cos(), angle.double().sin()
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(3)


def pieces(x: Tensor) -> Tensor:
    a, b = torch.complex(x, 1 - x).split(4, -1)
    z = torch.cat((a, b), 0).unsqueeze(1).expand(-1, 2, -1, -1).transpose(-1, -2)
    return torch.stack((z[..., ::2, :], z[..., 1::2, :] * 2j), -1).sub(1.5).abs() + z[
        :, :1, :1, :1
    ].angle().unsqueeze(-1)


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.fftn(x, dim=(-2, -1)).real + torch.fft.rfft(x).imag.sum(-1, True)


def filtered(x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * 0.5, n=7)


def of_an_input(z: Tensor) -> Tensor:
    return torch.view_as_real(z * z.real)


BIG, ANGLES = x(2, 3, 5, 8), x(5, 4)
# name -> (program, its inputs, the same in fp64)
PROGRAMS: dict[str, tuple[Callable[..., object], tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "rope": (turned, (BIG, ANGLES), turned_in_fp64),
    "rope of a transposed slice": (
        lambda x, a: turned(x[..., 2:].transpose(1, 2), a),
        (x(2, 5, 3, 10), ANGLES),
        lambda x, a: turned_in_fp64(x[..., 2:].transpose(1, 2), a),
    ),
    "rope in half precision": (turned, (BIG.bfloat16(), ANGLES), turned_in_fp64),
    "moved": (pieces, (x(2, 3, 8),), lambda x: pieces(x.double())),
    "transformed": (spectrum, (x(2, 6, 5),), lambda x: spectrum(x.double())),
    "there and back": (filtered, (x(3, 7),), lambda x: filtered(x.double())),
    "a complex input": (
        of_an_input,
        (torch.complex(x(2, 3), x(2, 3)),),
        lambda z: of_an_input(z.to(torch.complex128)),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_inside_of_a_graph_is_as_in_eager(name: str) -> None:
    program, inputs, _ = PROGRAMS[name]
    as_eager(program, *inputs, exact=False, strict=False)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("canonical", [False, True])
def test_the_oracle_computes_in_complex128(name: str, canonical: bool) -> None:
    program, inputs, exact = PROGRAMS[name]
    captured = capture(program, *inputs)
    if canonical:
        canonicalize(captured.gm)
    (found,) = raise_to_fp64(captured.gm)(*inputs)
    close(found, exact(*inputs), torch.float64)


class Odd(nn.Module):
    """Two linears of one input, 6 and 5 wide: merged, their results have a stride of 11 and an odd offset."""

    def __init__(self, first: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(8, first), nn.Linear(8, 11 - first)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        even, odd = (a, b) if a.shape[-1] % 2 == 0 else (b, a)
        z = torch.view_as_complex(even.unflatten(-1, (-1, 2)))
        return torch.view_as_real(z * 1j).flatten(-2) + odd.sum(-1, keepdim=True)


@pytest.mark.parametrize("first", [6, 5])
def test_pairs_at_odd_strides(first: int) -> None:
    """view_as_complex wants even strides and offsets, which a merged linear does not give."""
    as_eager(Odd(first), x(3, 8), exact=False)
    assert [m.rule for m in backend.reports()[-1].matches].count("merge_siblings") == 1


class WithTable(nn.Module):
    """A complex buffer, which is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.polar(torch.ones(5, 4), ANGLES), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(z * (self.table * 2)).flatten(-2)


def test_a_complex_weight() -> None:
    as_eager(WithTable(), BIG, exact=False, strict=False)
    captured, model = capture(WithTable(), BIG), WithTable()
    (found,) = raise_to_fp64(captured.gm)(*captured.bind((BIG,), {}))
    model.table = model.table.to(torch.complex128)
    close(found, model(BIG.double()), torch.float64)


def test_no_rule_takes_complex_numbers_for_real_ones() -> None:
    """A rope by halves of complex q and k: the op would drop the imaginary parts."""

    def halves(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return x * c.unsqueeze(1) + torch.cat((-x[..., 4:], x[..., :4]), -1) * s.unsqueeze(1)

    def program(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.view_as_real(halves(torch.complex(x, x * x), c, s)) for x in (q, k))

    as_eager(program, BIG, BIG + 1, x(1, 5, 8), x(1, 5, 8) + 1, exact=False, strict=False)
    assert not backend.reports()[-1].counts.get("rope")
    with_real = lambda q, k, c, s: (halves(q, c, s), halves(k, c, s))
    as_eager(with_real, BIG, BIG + 1, x(1, 5, 8), x(1, 5, 8) + 1, exact=False)
    assert backend.reports()[-1].counts["rope"] == 1


def test_views_of_parts_cost_nothing() -> None:
    gm = capture(lambda x: torch.view_as_real(torch.view_as_complex(x)).sum(), x(3, 2)).gm
    assert [flops(n) for n in gm.graph.nodes if n.op == "call_function"] == [0, 0, 6]


def written_parts(x: Tensor) -> Tensor:
    torch.view_as_real(torch.view_as_complex(x)).add_(1)
    return x * 2


def written_real_part(x: Tensor) -> Tensor:
    z = torch.complex(x, x)
    z.real.mul_(2)
    return z.abs()


@pytest.mark.parametrize(
    ("program", "inputs", "reason"),
    [
        (lambda x: torch.complex(x, x), (x(2),), r"an output \(complex.*\) has dtype torch.complex64"),
        (lambda x: torch.complex(x, x).conj().imag, (x(2),), "conj.*complex64, which no pass understands"),
        (
            lambda x: (torch.complex(x, x) @ torch.complex(x, x)).real,
            (x(2, 2),),
            "matmul.*has dtype torch.complex64",
        ),
        (lambda x: torch.complex(x, x).isnan().float(), (x(2),), "an argument of dtype torch.complex64"),
        (lambda x: torch.complex(x, x).mul_(2).real, (x(2),), "mul_.*has dtype torch.complex64"),
        (lambda x: (x * torch.tensor([1j])).real, (x(2),), "constant.*has dtype torch.complex64"),
        (
            lambda x: (torch.complex(x, x) * complex(0.0, -0.0)).real,
            (x(2),),
            r"literal -0j.*is not one in Python",
        ),
        (
            lambda x: (torch.complex(x, x) + complex(1, float("inf"))).real,
            (x(2),),
            "infj.*is not one in Python",
        ),
        (written_parts, (x(3, 2),), r"a view of the parts of complex numbers, is written \(aten.add_"),
        (written_real_part, (x(3),), r"a view of the parts of complex numbers, is written \(aten.mul_"),
        (
            lambda x: torch.view_as_real(torch.view_as_complex(x)),
            (x(3, 2),),
            "of complex numbers, is returned",
        ),
    ],
)
def test_refused_with_the_reason(
    program: Callable[..., object], inputs: tuple[Tensor, ...], reason: str
) -> None:
    with pytest.raises(CaptureRefused, match=reason):
        capture(program, *inputs)


def test_what_is_known_exists_and_does_not_write() -> None:
    for name in KNOWN:
        for overload in getattr(aten, name).overloads():
            op = getattr(getattr(aten, name), overload)
            assert torch.Tag.nondeterministic_seeded not in op.tags
            assert "out" in overload or not op._schema.is_mutable, op
