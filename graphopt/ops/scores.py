"""Attention logits and weights: the half-way ops that recognition grows towards `attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.attention import _scores, _weights
from graphopt.ops.define import op


@op
def attention_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    empty_rows_mean: bool = False,
) -> Tensor:
    """softcap(q @ k^T * scale) + bias, in q's dtype: q [B, H, Q, D], k [B, H, K, D] -> [B, H, Q, K].

    Exists between two rewrites only: rules let it swallow scale, softcap and masks, then softmax makes it
    `attention_weights`. A bool bias hides keys where it is False: with -inf, or under `empty_rows_mean` with
    the dtype's lowest number, as the eager code it stands for did.
    """
    scores = _scores(q, k, scale, softcap, bias).to(q.dtype)
    if bias is not None and bias.dtype == torch.bool:
        lowest = torch.finfo(scores.dtype).min if empty_rows_mean else float("-inf")
        scores = scores.masked_fill(~bias, lowest)
    return scores if bias is not None or softcap is not None else scores.clone()


@op
def attention_weights(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    empty_rows_mean: bool = False,
) -> Tensor:
    """What `attention` multiplies v with, in q's dtype: q [B, H, Q, D], k [B, H, K, D] -> [B, H, Q, K].

    Exists between two rewrites only: it is softmax(attention_scores(...)) until v makes it `attention`, whose
    arguments it has. Computed in fp32 (fp64 for fp64).
    """
    scores = _scores(q, k, scale, softcap, bias)
    seen = bias if bias is not None and bias.dtype == torch.bool else None
    return _weights(scores, seen, sinks, empty_rows_mean)[0].to(q.dtype)
