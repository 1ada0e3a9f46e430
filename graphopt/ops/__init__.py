"""The vocabulary: what the models that we optimise are made of, each op one plain PyTorch function.

`ops.rms_norm(x, weight, eps=1e-6)` calls `torch.ops.graphopt.rms_norm.default`; `ops.rms_norm.reference` is
the function itself and `ops.rms_norm.overload` the target that a graph's node has. No op aliases its inputs,
and only `rope_write` and `cache_write`, which lowering alone makes, change one.
"""

from graphopt.ops.attention import attention, attention_lse
from graphopt.ops.cache import cache_update
from graphopt.ops.comm import all_gather, all_reduce, reduce_scatter
from graphopt.ops.define import Op, op
from graphopt.ops.fused import cache_write, fused_linear, rms_norm_residual, rope_write
from graphopt.ops.linear import linear
from graphopt.ops.mlp import activation, gated_activation
from graphopt.ops.moe import expert_matmul, experts
from graphopt.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from graphopt.ops.quantized import linear_int8, pack_int8, scales_int8
from graphopt.ops.rope import rope
from graphopt.ops.scores import attention_scores, attention_weights

OPS = (
    rms_norm,
    add_rms_norm,
    layer_norm,
    add_layer_norm,
    rope,
    attention,
    attention_lse,
    attention_scores,
    attention_weights,
    cache_update,
    linear,
    linear_int8,
    scales_int8,
    pack_int8,
    gated_activation,
    activation,
    experts,
    expert_matmul,
    all_reduce,
    all_gather,
    reduce_scatter,
    fused_linear,
    rms_norm_residual,
    rope_write,
    cache_write,
)

__all__ = ["OPS", "Op", "op", *(o.__name__ for o in OPS)]
