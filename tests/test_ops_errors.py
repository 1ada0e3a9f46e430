"""Each guard of each op, tripped: on real tensors and already on fake ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt import ops
from tests import op_cases

E = torch.empty
INT = torch.int64


def attends(**options: object) -> Callable[[], object]:
    """A call of attention at B=2, H=4, Hk=2, Q=3, K=5, D=8, with other arguments put in."""
    sizes = {"q": E(2, 4, 3, 8), "k": E(2, 2, 5, 8), "v": E(2, 2, 5, 6), "scale": 1.0}
    return lambda: ops.attention(**{**sizes, **options})


def rotates(**options: object) -> Callable[[], object]:
    """A call of rope at B=2, H=4, Hk=2, S=3, D=8, rotary_dim=4, with other arguments put in."""
    sizes = {"q": E(2, 4, 3, 8), "k": E(2, 2, 3, 8), "cos": E(1, 3, 4), "sin": E(1, 3, 4), "rotary_dim": 4}
    return lambda: ops.rope(**{**sizes, **options})


def updates(new: Tensor, position: Tensor | None = None) -> Callable[[], object]:
    """A call of cache_update at B=2, H=4, L=5, D=8."""
    return lambda: ops.cache_update(E(2, 4, 5, 8), new, position)


def fused(x: Tensor | None = None, weight: Tensor | None = None, **parts: object) -> object:
    """A call of fused_linear at x [3, 5], weight [4, 5], with other arguments put in."""
    return op_cases.fused(E(3, 5) if x is None else x, E(4, 5) if weight is None else weight, **parts)


def writes(**options: object) -> object:
    """A call of cache_write at B=2, H=2, S=3, L=5, D=8, with other arguments put in."""
    sizes = {"k": E(2, 2, 3, 8), "v": E(2, 2, 3, 8), "k_cache": E(2, 2, 5, 8), "v_cache": E(2, 2, 5, 8)}
    return ops.cache_write(**{**sizes, "position": torch.arange(3), "start": None, **options})  # type: ignore[arg-type]


def rope_writes(**options: object) -> object:
    """A call of rope_write at the sizes of `writes`, with other arguments put in."""
    sizes = {"q": E(2, 4, 3, 8), "k": E(2, 2, 3, 8), "v": E(2, 2, 3, 8), "cos": E(1, 3, 8), "sin": E(1, 3, 8)}
    norms = {"q_norm": None, "k_norm": None, "eps": 1e-6, "weight_offset": 0.0, "cast_before_scale": True}
    caches = {"k_cache": E(2, 2, 5, 8), "v_cache": E(2, 2, 5, 8), "position": torch.arange(3), "start": None}
    plain = {**sizes, "rotary_dim": 8, "interleaved": False, **norms, **caches}
    return ops.rope_write(**{**plain, **options})  # type: ignore[arg-type]


def chooses(**options: object) -> object:
    """A call of experts at T=3, k=2, E=4, H=5, I=3, N=5, with other arguments put in."""
    sizes = {"x": E(3, 5), "ids": torch.zeros(3, 2, dtype=INT), "routing": E(3, 2), "kind": "silu"}
    return ops.experts(**{**sizes, "gate_up": E(4, 6, 5), "down": E(4, 5, 3), **options})  # type: ignore[arg-type]


def multiplies(**options: object) -> object:
    """A call of expert_matmul at S=3, K=5, E=4, N=7, with other arguments put in."""
    sizes = {"x": E(3, 5), "weight": E(4, 5, 7), "ids": torch.zeros(3, dtype=INT)}
    return ops.expert_matmul(**{**sizes, **options})  # type: ignore[arg-type]


x, w = E(3, 5), E(5)
ERRORS: dict[str, Callable[[], object]] = {
    "rms_norm: x is torch.int64; it must be floating": lambda: ops.rms_norm(E(3, 5, dtype=INT), w, 1e-6),
    "rms_norm: x has 0 dimensions; it must have at least 1": lambda: ops.rms_norm(E(()), None, 1e-6),
    "rms_norm: weight has 2 dimensions; it must have 1": lambda: ops.rms_norm(x, E(1, 5), 1e-6),
    "rms_norm: size of weight is 4; it must be 5": lambda: ops.rms_norm(x, E(4), 1e-6),
    "add_rms_norm: x is torch.bool; it must be floating": lambda: ops.add_rms_norm(x > 0, x, w, 1e-6),
    "rms_norm: size of weight is 3; it must be 5": lambda: ops.add_rms_norm(x, x, E(3), 1e-6),
    "layer_norm: size of bias is 4; it must be 5": lambda: ops.layer_norm(x, w, E(4), 1e-5),
    "layer_norm: bias has 0 dimensions; it must have 1": lambda: ops.layer_norm(x, w, E(()), 1e-5),
    "layer_norm: size of weight is 4; it must be 5": lambda: ops.add_layer_norm(x, x, E(4), None, 1e-5),
    "add_layer_norm: x has 0 dimensions; it must have at least 1": lambda: ops.add_layer_norm(
        E(()), x, w, w, 1e-5
    ),
    "kind 'swish' is not one of silu, gelu, gelu_tanh": lambda: ops.activation(x, "swish"),
    "kind 'swiglu' is not one of silu": lambda: ops.gated_activation(x, x, "swiglu"),
    "activation: x is torch.int64; it must be floating": lambda: ops.activation(E(3, dtype=INT), "relu"),
    "gated_activation: up is torch.int64; it must be floating": lambda: ops.gated_activation(
        x, E(3, 5, dtype=INT), "silu"
    ),
    "experts: ids is torch.float32; it must be torch.int64": lambda: chooses(ids=E(3, 2)),
    "experts: rows of ids is 2; it must be 3": lambda: chooses(ids=E(2, 2, dtype=INT)),
    "experts: x has 3 dimensions; it must have 2": lambda: chooses(x=E(1, 3, 5)),
    "experts: columns of routing is 1; it must be 2": lambda: chooses(routing=E(3, 1)),
    "experts: rows of routing is 2; it must be 3": lambda: chooses(routing=E(2, 2)),
    "experts: columns of routing is 2; it must be 4": lambda: chooses(ids=None),
    "experts: last size of gate_up is 6; it must be 5": lambda: chooses(gate_up=E(4, 6, 6)),
    "experts: rows of gate_up is 3; it must be 6": lambda: chooses(gate_up=E(4, 3, 5)),
    "experts: experts of down is 3; it must be 4": lambda: chooses(down=E(3, 5, 3)),
    "experts: experts of down_bias is 3; it must be 4": lambda: chooses(down_bias=E(3, 5)),
    "experts: last size of gate_up_bias is 3; it must be 6": lambda: chooses(gate_up_bias=E(4, 3)),
    "experts: gate_softcap is for a gated silu, not for gelu": lambda: chooses(kind="gelu", gate_softcap=1.0),
    "kind 'elu6' is not one of silu": lambda: chooses(kind="elu6"),
    "expert_matmul: ids has 2 dimensions; it must have 1": lambda: multiplies(ids=E(3, 1, dtype=INT)),
    "expert_matmul: last size of x is 6; it must be 5": lambda: multiplies(x=E(3, 6)),
    "expert_matmul: weight has 2 dimensions; it must have 3": lambda: multiplies(weight=E(5, 7)),
    "expert_matmul: experts of bias is 3; it must be 4": lambda: multiplies(bias=E(3, 7)),
    "expert_matmul: last size of bias is 1; it must be 7": lambda: multiplies(bias=E(4, 1)),
    "linear: x is torch.int64; it must be floating": lambda: ops.linear(E(3, 5, dtype=INT), E(4, 5), None),
    "linear: weight has 1 dimensions; it must have 2": lambda: ops.linear(x, w, None),
    "linear: x has 0 dimensions; it must have at least 1": lambda: ops.linear(E(()), E(4, 5), None),
    "linear: last size of x is 5; it must be 6": lambda: ops.linear(x, E(4, 6), None),
    "linear: bias has 2 dimensions; it must have 1": lambda: ops.linear(x, E(4, 5), E(1, 4)),
    "linear: size of bias is 5; it must be 4": lambda: ops.linear(x, E(4, 5), w),
    "kind 'elu' is not one of silu": lambda: fused(activation="elu"),
    "fused_linear: last size of x is 5; it must be 7": lambda: fused(weight=E(4, 7)),
    "fused_linear: weight has 1 dimensions; it must have 2": lambda: fused(weight=E(5)),
    "fused_linear: scales has 1 dimensions; it must have 2": lambda: fused(scales=E(4)),
    "fused_linear: rows of scales is 3; it must be 4": lambda: fused(scales=E(3, 1)),
    "fused_linear: bias has 2 dimensions; it must have 1": lambda: fused(bias=E(1, 4)),
    "fused_linear: size of bias is 1; it must be 4": lambda: fused(bias=E(1)),
    "fused_linear: gated without an activation": lambda: fused(gated=True),
    "fused_linear: gated with 3 rows; it takes gate and up": lambda: fused(
        weight=E(3, 5), gated=True, activation="silu"
    ),
    "fused_linear: norm 'batch' is not one of rms, layer": lambda: fused(norm="batch"),
    "rope_write: give both of q_norm and k_norm, or none": lambda: rope_writes(q_norm=E(8)),
    "rope_write: head_dim of v is 9; it must be 8": lambda: rope_writes(v=E(2, 2, 3, 9)),
    "cache_write: k has 3 dimensions; it must have 4": lambda: writes(k=E(2, 2, 8)),
    "cache_write: number of heads of k is 3; it must be 2": lambda: writes(k=E(2, 3, 3, 8)),
    "cache_write: v is torch.float64; it must be torch.float32, as its cache": lambda: writes(
        v=E(2, 2, 3, 8, dtype=torch.float64)
    ),
    "cache_write: give one of position and start": lambda: writes(start=torch.tensor(0)),
    "cache_write: position is torch.float32; it must be int64 or int32": lambda: writes(position=E(3)),
    "cache_write: size of position is 2; it must be 3": lambda: writes(position=torch.arange(2)),
    "cache_write: number of elements of start is 2; it must be 1": lambda: writes(
        position=None, start=torch.arange(2)
    ),
    "rope: k is torch.int64; it must be floating": rotates(k=E(2, 2, 3, 8, dtype=INT)),
    "rope: q has 3 dimensions; it must have 4": rotates(q=E(2, 3, 8)),
    "rope: sin has 2 dimensions; it must have 3": rotates(sin=E(3, 4)),
    "rope: rotary_dim is 3; it must be even and not negative": rotates(rotary_dim=3),
    "rope: rotary_dim is -2; it must be even and not negative": rotates(rotary_dim=-2),
    "rope: rotary_dim 4 > 2, the head_dim of k": rotates(k=E(2, 2, 3, 2)),
    "rope: batch of cos is 3; it must be 2": rotates(cos=E(3, 3, 4)),
    "rope: length of sin is 1; it must be 3": rotates(sin=E(1, 1, 4)),
    "rope: last size of cos is 8; it must be 4": rotates(cos=E(1, 3, 8)),
    "cache_update: new has 3 dimensions; it must have 4": updates(E(4, 1, 8)),
    "cache_update: batch of new is 1; it must be 2": updates(E(1, 4, 1, 8)),
    "cache_update: number of heads of new is 2; it must be 4": updates(E(2, 2, 1, 8)),
    "cache_update: head_dim of new is 6; it must be 8": updates(E(2, 4, 1, 6)),
    "cache_update: new is torch.float64; it must be torch.float32, as the cache": updates(
        E(2, 4, 1, 8, dtype=torch.float64)
    ),
    "cache_update: position has 0 dimensions; it must have 1": updates(E(2, 4, 1, 8), E((), dtype=INT)),
    "cache_update: size of position is 2; it must be 1": updates(E(2, 4, 1, 8), E(2, dtype=INT)),
    "cache_update: position is torch.float32; it must be int64 or int32": updates(E(2, 4, 1, 8), E(1)),
    "all_reduce: axis '0 1' is no name of a mesh axis": lambda: ops.all_reduce(E(2), "0 1"),
    "all_reduce: reduction 'mean' is not one of sum, avg, max, min": lambda: ops.all_reduce(
        E(2), "tp", "mean"
    ),
    "all_gather: dim 2 is outside of a tensor with 2 dimensions": lambda: ops.all_gather(E(2, 3), "tp", 2),
    "reduce_scatter: dim -2 is outside of a tensor with 1 dim": lambda: ops.reduce_scatter(E(2), "tp", -2),
    "attention: v is torch.int64; it must be floating": attends(v=E(2, 2, 5, 6, dtype=INT)),
    "attention: k has 3 dimensions; it must have 4": attends(k=E(2, 5, 8)),
    "attention: batch of k is 3; it must be 2": attends(k=E(3, 2, 5, 8)),
    "attention: number of heads of v is 1; it must be 2": attends(v=E(2, 1, 5, 6)),
    "attention: length of v is 4; it must be 5": attends(v=E(2, 2, 4, 6)),
    "attention: head_dim of k is 7; it must be 8": attends(k=E(2, 2, 5, 7)),
    "attention: 3 query heads are no multiple of 2 kv heads": attends(q=E(2, 3, 3, 8)),
    "attention: 4 query heads are no multiple of 0 kv heads": attends(k=E(2, 0, 5, 8), v=E(2, 0, 5, 6)),
    "attention: window 0 < 1": attends(window=0),
    "attention: softcap 0.0 is not positive": attends(softcap=0.0),
    "attention: offset_tensor is torch.float32; it must be an integer": attends(offset_tensor=E(())),
    "attention: offset_tensor is torch.bool; it must be an integer": attends(
        offset_tensor=E((), dtype=torch.bool)
    ),
    "attention: number of elements of offset_tensor is 2; it must be 1": attends(
        offset_tensor=E(2, dtype=INT)
    ),
    "attention: sinks has 2 dimensions; it must have 1": attends(sinks=E(1, 4)),
    "attention: size of sinks is 2; it must be 4": attends(sinks=E(2)),
    "attention: key_padding has 4 dimensions; it must have 2": attends(key_padding=E(2, 1, 1, 5) > 0),
    "attention: key_padding is torch.float32; pass an additive mask as bias": attends(key_padding=E(2, 5)),
    "attention: batch of key_padding is 1; it must be 2": attends(key_padding=E(1, 5) > 0),
    "attention: length of key_padding is 3; it must be 5": attends(key_padding=E(2, 3) > 0),
    "attention: bias is torch.int64; it must be bool or floating": attends(bias=E(3, 5, dtype=INT)),
    "attention: bias has 5 dimensions; it must have at most 4": attends(bias=E(1, 1, 1, 3, 5)),
    "attention: size of bias in dimension -2 is 4; it must be 3": attends(bias=E(4, 5)),
    "attention: size of bias in dimension -3 is 2; it must be 4": attends(bias=E(2, 3, 5) > 0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_guard_says_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ERRORS[message]()
    assert str(raised.value).startswith(message)


def test_guards_speak_before_anything_runs() -> None:
    """The fakes check what the references check, so that a wrong graph fails where it is made."""
    cos, k = E(1, 3, 6, device="meta"), E(2, 2, 3, 8, device="meta")
    with pytest.raises(ValueError, match="rope: last size of cos is 6; it must be 4"):
        ops.rope(k, k, cos, cos, 4)
    with pytest.raises(ValueError, match="attention: window -1 < 1"):
        ops.attention(k, k, k, 1.0, window=-1)
    with pytest.raises(ValueError, match="attention: window -1 < 1"):
        ops.attention_lse(k, k, k, 1.0, window=-1)
    with pytest.raises(ValueError, match="cache_update: head_dim of new is 9; it must be 8"):
        ops.cache_update(k, E(2, 2, 3, 9, device="meta"), None)
    with pytest.raises(ValueError, match="kind 'x' is not one of"):
        fused(k, E(4, 8, device="meta"), activation="x")
    with pytest.raises(ValueError, match="rms_norm: size of weight is 2; it must be 8"):
        ops.rms_norm(k, E(2, device="meta"), 1e-6)


def test_position_outside_of_the_cache_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        ops.cache_update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 1, 2), torch.tensor([3]))


def test_linear_of_two_dtypes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(E(3, 5), E(4, 5, dtype=torch.float64), None)
