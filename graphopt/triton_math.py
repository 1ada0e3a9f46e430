"""What Triton kernels share: activations in fp32, spelled so that the interpreter can run them too.

No libdevice (the interpreter has none): tanh and sigmoid are made of exp.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); x fp32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """2 * sigmoid(2x) - 1; x fp32. Absolute error 1e-7: exp overflows to inf, and 1 / inf is 0."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of that kind (`graphopt.ops.mlp.ACTIVATIONS`; "" is none), elementwise; x fp32."""
    if KIND == "silu":
        x = x * sigmoid(x)
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "quick_gelu":
        x = x * sigmoid(1.702 * x)
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    elif KIND == "sigmoid":
        x = sigmoid(x)
    elif KIND == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(KIND == "", "unknown activation")
    return x
