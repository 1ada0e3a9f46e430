"""Activations written by hand, and gated activations (Shazeer 2020, GLU variants)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from graphopt import graph as g
from graphopt import ops
from graphopt.binding import Binding
from graphopt.rule import T, Text, rule


def hand_silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)"""
    return x * torch.sigmoid(x)


def gpt2_gelu(x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) (Hendrycks & Gimpel 2016)"""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def cubed_gelu(x: Tensor) -> Tensor:
    """As GPT-2's, the cube as x * x * x."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))


def factored_gelu(x: Tensor) -> Tensor:
    """As GPT-2's, the cube's factor first: 0.044715 * x * x * x."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def bloom_gelu(x: Tensor) -> Tensor:
    """x * 0.5 * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))"""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


def fast_gelu(x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))"""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def erf_gelu(x: Tensor) -> Tensor:
    """x * 0.5 * (1 + erf(x / sqrt(2)))"""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def multiplied_erf_gelu(x: Tensor) -> Tensor:
    """x * 0.5 * (1 + erf(x * sqrt(1/2)))"""
    return x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


def weighted_erf_gelu(x: Tensor) -> Tensor:
    """x * (0.5 * (1 + erf(x / sqrt(2)))): the weight is Gauss's distribution function"""
    return x * (0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))))


def weighted_multiplied_erf_gelu(x: Tensor) -> Tensor:
    """x * (0.5 * (1 + erf(x * sqrt(1/2))))"""
    return x * (0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))))


def clip_quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 * x)"""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, Primer)"""
    return ops.activation(x, "relu").pow(2)


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up"""
    return ops.activation(gate, kind) * up


def wide_gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up in fp32 of what is half, and half again: what the op does anyway (Beam's experts)"""
    return ops.gated_activation(gate.to(torch.float32), up.to(torch.float32), kind).to(gate.dtype)


def _activation(kind: str) -> Callable[[Tensor], Tensor]:
    return lambda x: ops.activation(x, kind)


def _not_fp64(binding: Binding) -> str | None:
    """Its constant is sqrt(2 / pi) up to 1e-9: more than fp32 resolves, and less than fp64."""
    x = binding.leaves["x"]
    assert isinstance(x, fx.Node)
    return "0.79788456 is not sqrt(2 / pi) in fp64" if g.dtype(x) == torch.float64 else None


_ACTIVATIONS = (
    (hand_silu, "silu"),
    (erf_gelu, "gelu"),
    (multiplied_erf_gelu, "gelu"),
    (weighted_erf_gelu, "gelu"),
    (weighted_multiplied_erf_gelu, "gelu"),
    (gpt2_gelu, "gelu_tanh"),
    (cubed_gelu, "gelu_tanh"),
    (factored_gelu, "gelu_tanh"),
    (fast_gelu, "gelu_tanh"),
    (clip_quick_gelu, "quick_gelu"),
    (squared_relu, "relu2"),
)

RULES = (
    *(rule(pattern, _activation(kind), x=T("... n")) for pattern, kind in _ACTIVATIONS),
    rule(bloom_gelu, _activation("gelu_tanh"), x=T("... n"), guard=_not_fp64),
    rule(
        gated,
        lambda gate, up, kind: ops.gated_activation(gate, up, kind),
        gate=T("... n"),
        up=T("... n"),
        kind=Text("quick_gelu"),
    ),
    *(
        rule(
            wide_gated,
            lambda gate, up, kind: ops.gated_activation(gate, up, kind),
            gate=T("... n", half),
            up=T("... n", half),
            kind=Text("quick_gelu"),
        )
        for half in ("bfloat16", "float16")
    ),
)
