"""What an eager run of a model contains, seen from outside: counts that share nothing with the rules."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

ADDS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
ACTIVATIONS = ("gelu", "silu", "relu")  # in the class's name; a pooler's tanh is no MLP
LINEARS = ("Linear", "Conv1D")  # Conv1D: GPT-2's linear, its weight transposed

# What a report's counts are called here: several ops of the vocabulary are one thing of the model.
OPS_OF: Mapping[str, tuple[str, ...]] = {
    "norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    "norm of a sum": ("add_rms_norm", "add_layer_norm"),
    "rope": ("rope",),
    "attention": ("attention", "attention_lse"),
    "mlp": ("gated_activation", "activation"),
    "linear": ("linear", "linear_int8", "fused_linear"),
}


@dataclass
class Seen(TorchFunctionMode):
    """The calls of an eager run: `counts` by the names of OPS_OF, the visible `logits` of each attention."""

    counts: Counter[str] = field(default_factory=Counter)
    logits: list[torch.Tensor] = field(default_factory=list)
    sums: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # by address; kept, so that none is used again

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Note softmaxes, fused attentions and sums of two tensors; change nothing."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self._attention(_sdpa_logits(*args, **(kwargs or {})))
        elif name == "softmax":
            self._attention(args[0])
        elif name in ADDS and all(isinstance(x, torch.Tensor) and x.dim() > 1 for x in args[:2]):
            self.sums[result.data_ptr()] = result
        return result

    def _attention(self, logits: torch.Tensor) -> None:
        self.counts["attention"] += 1
        self.logits.append(logits[logits > -1e4].float())

    def norm(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of norms."""
        self.counts["norm"] += 1
        summed = self.sums.get(args[0].data_ptr())
        self.counts["norm of a sum"] += summed is not None and summed.shape == args[0].shape

    def mlp(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of activation functions."""
        self.counts["mlp"] += 1

    def linear(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of linear layers."""
        self.counts["linear"] += 1

    def rope(self, apply: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Stands for a modeling file's function that rotates q and k."""
        self.counts["rope"] += 1
        return apply(*args, **kwargs)


def _sdpa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What a fused attention gives its softmax [batch, heads, queries, keys]; hidden logits are -inf."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1e4)
    return logits.masked_fill(~visible, -torch.inf)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class's name: independent of what it computes."""
    return type(module).__name__.lower().endswith("norm") and not list(module.children())


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Count what OPS_OF names, of the eager calls of a model inside the block."""
    seen = Seen()
    with ExitStack() as undo:
        files = {sys.modules[type(m).__module__] for m in model.modules()}
        for file in files:
            if apply := getattr(file, "apply_rotary_pos_emb", None):
                undo.enter_context(
                    mock.patch.object(file, "apply_rotary_pos_emb", functools.partial(seen.rope, apply))
                )
        for module in model.modules():
            for is_kind, hook in (
                (is_norm, seen.norm),
                (_is_activation, seen.mlp),
                (_is_linear, seen.linear),
            ):
                if is_kind(module):
                    undo.callback(module.register_forward_pre_hook(hook).remove)
        undo.enter_context(seen)
        yield seen


def _is_activation(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(a in name for a in ACTIVATIONS) and not list(module.children())


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in LINEARS


def expected_counts(model: nn.Module, **inputs: object) -> dict[str, int]:
    """How many norms, norms of a sum, ropes, attentions, MLPs and linears one call of the model has."""
    with torch.no_grad(), watching(model) as seen:
        model(**inputs)
    return {name: seen.counts[name] for name in OPS_OF}


def recognised_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The same from a report's `counts` (op name -> occurrences)."""
    return {name: sum(counts.get(op, 0) for op in ops) for name, ops in OPS_OF.items()}
