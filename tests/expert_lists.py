"""Mixtures of experts whose experts are modules in a list, as people write them: each sum in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS, CHOSEN, WIDTH, INNER = 3, 2, 10, 6
Sum = Callable[["Mixture", Tensor, Tensor, Tensor], Tensor]


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=bias) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """As the gated one, gate and up by one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """down(gelu(up(x)))"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        return self.down(F.gelu(self.up(x)))


class Mixture(nn.Module):
    """x + the routed sum of its experts, which `sum_of` writes."""

    def __init__(self, sum_of: Sum, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self.sum_of = sum_of
        for p in self.parameters():
            nn.init.normal_(p, std=1.5 * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]"""
        scores = self.router(x)
        values, ids = torch.topk(scores, CHOSEN, -1)
        return x + self.sum_of(self, x, ids, torch.softmax(values.float(), -1).to(x.dtype))

    def rows(self, x: Tensor, ids: Tensor, routing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All of them with one row for each token."""
        return x.reshape(-1, WIDTH), ids.reshape(-1, CHOSEN), routing.reshape(-1, CHOSEN)


def index_add(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Mixtral's: a mask of one-hot choices, each expert's rows taken and added back."""
    rows, ids, routing = self.rows(x, ids, routing)
    mask = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
    out = torch.zeros_like(rows)
    for e, expert in enumerate(self.experts):
        place, row = torch.where(mask[e])
        y = expert(rows[None, row].reshape(-1, WIDTH)) * routing[row, place, None]
        out.index_add_(0, row, y.to(x.dtype))
    return out.view(x.shape)


def put_back(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Mistral's reference: y[rows] += routing * expert(x[rows])"""
    rows, ids, routing = self.rows(x, ids, routing)
    out = torch.zeros_like(rows)
    for e, expert in enumerate(self.experts):
        row, place = torch.where(ids == e)
        out[row] += routing[row, place, None] * expert(rows[row])
    return out.view(x.shape)


def put_accumulated(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """index_put_(accumulate=True), the weights as rows of one column"""
    rows, ids, routing = self.rows(x, ids, routing)
    out = rows.new_zeros(rows.shape)
    for e, expert in enumerate(self.experts):
        row, place = torch.where(ids == e)
        out.index_put_((row,), routing[row, place].unsqueeze(-1) * expert(rows[row]), accumulate=True)
    return out.view(x.shape)


def columns(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Every expert on every token, times its column of scattered weights"""
    gates = torch.zeros_like(self.router(x)).scatter(-1, ids, routing)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        out = out + expert(x) * gates[..., e, None]
    return out


def python_sum(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Granite's softmax of what is chosen, -inf elsewhere; sum() starts from 0"""
    scores = self.router(x)
    gates = torch.full_like(scores, float("-inf")).scatter(-1, ids, scores.gather(-1, ids))
    gates = gates.float().softmax(-1).to(x.dtype)
    return sum(gates[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]  # a sum of tensors is one


def chosen_scores(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """A mask of ones at what is chosen, times all experts' scores, on rows"""
    rows, ids, _ = self.rows(x, ids, routing)
    scores = torch.sigmoid(self.router(rows))
    gates = torch.zeros_like(scores).scatter(-1, ids, torch.ones_like(ids, dtype=x.dtype)) * scores
    gates = gates / scores.sum(-1, keepdim=True)
    out = self.experts[0](rows) * gates[:, 0:1]
    for e in range(1, EXPERTS):
        out = gates[:, e : e + 1] * self.experts[e](rows) + out
    return out.view(x.shape)


def masked_sums(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """Each expert's weight as the sum over its choices, on what is there already"""
    out = x * 0.5
    for e, expert in enumerate(self.experts):
        out = out + ((ids == e) * routing).sum(-1, keepdim=True) * expert(x)
    return out


def all_of_them(self: Mixture, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    """A soft mixture: nothing is chosen"""
    gates = torch.softmax(self.router(x), -1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        out += gates[..., e : e + 1] * expert(x)
    return out


SUMS = (index_add, put_back, put_accumulated, columns, python_sum, chosen_scores, masked_sums, all_of_them)
SOFT = (all_of_them,)  # in which every expert sees every row


def mixtures() -> Iterator[tuple[str, Callable[[], Mixture]]]:
    """Every way to write the sum, of gated experts; every form of expert, in two of them."""
    for sum_of in SUMS:
        yield sum_of.__name__, lambda sum_of=sum_of: Mixture(sum_of)
    for expert in (Packed, Plain, lambda: Gated(bias=True)):
        name = getattr(expert, "__name__", "").strip("<>")
        for sum_of in (index_add, columns):
            yield f"{sum_of.__name__} {name}", lambda s=sum_of, e=expert: Mixture(s, e)
