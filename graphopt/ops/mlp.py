"""Activations, alone and multiplied by the other half of a gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.ops.define import op, require_floating, wide


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


# kind -> its function. Sources: silu Elfwing et al. 2017; gelu, gelu_tanh and quick_gelu Hendrycks & Gimpel
# 2016 (section 2); relu2 So et al. 2021, "Primer".
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": torch.relu,
    "relu2": _relu2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def require_kind(kind: str) -> None:
    """Raise ValueError for a kind that `ACTIVATIONS` does not have."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(ACTIVATIONS)}")


def act(x: Tensor, kind: str) -> Tensor:
    """The activation of that kind, in x's own dtype. Raises ValueError for an unknown kind."""
    require_kind(kind)
    return ACTIVATIONS[kind](x)


def _activation_fake(x: Tensor, kind: str) -> Tensor:
    require_floating("activation", x=x)
    require_kind(kind)
    return torch.empty_like(x)


@op(fake=_activation_fake)
def activation(x: Tensor, kind: str) -> Tensor:
    """act(x), elementwise; kind is a key of `ACTIVATIONS`.

    x of any shape. Computed in fp32 (fp64 for fp64), returned in x's dtype.
    Raises ValueError for an unknown kind and where x is not floating.
    """
    require_floating("activation", x=x)
    return act(x.to(wide(x.dtype)), kind).to(x.dtype)


def _gated_activation_fake(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    require_floating("gated_activation", gate=gate, up=up)
    require_kind(kind)
    return gate * up


@op(fake=_gated_activation_fake)
def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up, elementwise: SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh".

    gate and up of shapes that broadcast. Computed in fp32 (fp64 for fp64) and rounded once to torch's
    promotion of both.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; silu_and_mul in vLLM.
    Raises ValueError for an unknown kind and where an input is not floating.
    """
    require_floating("gated_activation", gate=gate, up=up)
    dtype = torch.result_type(gate, up)
    return (act(gate.to(wide(dtype)), kind) * up.to(wide(dtype))).to(dtype)
