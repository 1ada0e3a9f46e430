"""The calls of attention that its Triton kernels are tested at: every kind of mask and part, at any size."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from graphopt.kernel import Case, Tensor

HALF = torch.bfloat16


def case(
    name: str, heads: int = 4, kv_heads: int = 4, queries: int = 7, keys: int = 7, dim: int = 16,
    value_dim: int = 0, batch: int = 2, layout: str = "transposed", dtype: torch.dtype | None = None,
    parts: Mapping[str, object] = MappingProxyType({}), **rest: object,
) -> Case:  # fmt: skip
    """A case of attention; `parts` and `rest` are the arguments after scale, by name."""
    names = (
        "causal",
        "offset",
        "offset_tensor",
        "window",
        "key_padding",
        "bias",
        "softcap",
        "sinks",
        "empty_rows_mean",
    )
    defaults = dict.fromkeys(names) | {"causal": False, "offset": 0, "empty_rows_mean": False}
    q = Tensor((batch, heads, queries, dim), dtype, layout=layout, scale=2.0)
    k = Tensor((batch, kv_heads, keys, dim), dtype, layout=layout, scale=2.0)
    v = Tensor((batch, kv_heads, keys, value_dim or dim), dtype, layout=layout)
    return Case(name, (q, k, v, dim**-0.5 * 0.5, *(defaults | dict(parts) | rest).values()))


def masks(queries: int, keys: int, heads: int = 2, batch: int = 2) -> dict[str, dict[str, object]]:
    """Every kind of mask and part, for cases of that many queries and keys."""
    padding = Tensor((batch, keys), torch.bool)
    zero_one = Tensor((batch, keys), torch.int64, below=2)
    late = Tensor((1,), torch.int64, layout="sliced")  # the second of 0, 1
    sinks = Tensor((heads,))
    return {
        "causal": {"causal": True},
        "causal with an offset": {"causal": True, "offset": keys - queries, "offset_tensor": late},
        "causal, rows before all keys": {"causal": True, "offset": -3},
        "causal, rows before all keys, mean": {"causal": True, "offset": -3, "empty_rows_mean": True},
        "window": {"causal": True, "offset": keys - queries, "window": 21},
        "window of one": {"causal": True, "offset": keys - queries, "window": 1},
        "window without causal": {"window": 9},
        "widest window, rows before all keys": {"window": 2**30 - 1, "offset": -3},
        "window past the end, mean": {"window": 9, "offset": keys, "empty_rows_mean": True},
        "padding": {"key_padding": padding},
        "padding of integers, causal": {"key_padding": zero_one, "causal": True},
        "padding before, causal, mean": {
            "key_padding": Tensor((batch, keys), torch.bool, layout="sliced"),
            "causal": True,
            "empty_rows_mean": True,
        },
        "padding of all": {"key_padding": Tensor((batch, keys), torch.int32, below=1)},
        "padding of all, mean": {
            "key_padding": Tensor((batch, keys), torch.int32, below=1),
            "empty_rows_mean": True,
        },
        "padding of all, mean, sinks": {
            "key_padding": Tensor((batch, keys), torch.int32, below=1),
            "empty_rows_mean": True,
            "sinks": sinks,
        },
        "bias": {"bias": Tensor((batch, 1, queries, keys))},
        "bias of heads": {"bias": Tensor((1, heads, queries, keys))},
        "bias of rows": {"bias": Tensor((queries, 1))},
        "bias of keys, fp32, causal": {"bias": Tensor((keys,), torch.float32), "causal": True},
        "bias of choice": {"bias": Tensor((batch, 1, queries, keys), torch.bool)},
        "bias of choice, mean": {"bias": Tensor((1, 1, 1, keys), torch.bool), "empty_rows_mean": True},
        "softcap": {"softcap": 3.0},
        "softcap, bias": {"softcap": 3.0, "bias": Tensor((1, 1, queries, keys))},
        "sinks": {"sinks": sinks},
        "everything": {
            "causal": True,
            "offset": keys - queries,
            "offset_tensor": late,
            "window": 40,
            "key_padding": padding,
            "bias": Tensor((batch, heads, queries, keys)),
            "softcap": 5.0,
            "sinks": sinks,
            "empty_rows_mean": True,
        },
    }


def must(name: str, dim: int, queries: int = 4096, dtype: torch.dtype | None = HALF, **rest: object) -> Case:
    """A case of a real size: 32 heads on `keys` (default: as many as queries) keys."""
    parts: dict[str, object] = {"heads": 32, "kv_heads": 8, "batch": 1, "keys": queries}
    return case(name, dim=dim, queries=queries, dtype=dtype, **(parts | rest))  # type: ignore[arg-type]  # by name
