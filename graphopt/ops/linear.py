"""The linear layer; `fused` has it with all that is around it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.define import op, require_floating, require_rank, require_size


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless x [..., in], weight [out, in] and bias [out] fit."""
    require_floating(name, x=x, weight=weight)
    require_rank(name, 2, weight=weight)
    if x.dim() == 0:
        raise ValueError(f"{name}: x has 0 dimensions; it must have at least 1")
    require_size(name, "last size of x", x.shape[-1], weight.shape[1])
    if bias is not None:
        require_rank(name, 1, bias=bias)
        require_size(name, "size of bias", bias.shape[0], weight.shape[0])


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check("linear", x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(fake=_linear_fake)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias.

    x [..., in], weight [out, in], bias [out] or None -> [..., out], in x's dtype: torch.nn.functional.linear.
    Raises ValueError where the sizes do not fit, RuntimeError where the dtypes do not.
    """
    _check("linear", x, weight, bias)
    return F.linear(x, weight, bias)
