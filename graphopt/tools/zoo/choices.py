"""Inputs on which a model's choices are clear, so that rounding does not make them.

A token whose last expert and whose next one have nearly the same score goes to either of them, as the last
bit decides; from there on two right results are as far apart as a right and a wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from graphopt.tools.zoo.inputs import example

SEEDS = 16  # of inputs that are tried


@dataclass
class Margins(TorchFunctionMode):
    """The `least` distance between what a top-k takes and what it leaves, in deviations of its scores.

    mask: [batch, length], 0 at padding, whose choices do not count.
    """

    mask: torch.Tensor | None = None
    least: float = math.inf

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(  # of TorchFunctionMode
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk":
            self.see(*args, **(kwargs or {}))  # type: ignore[arg-type]  # as topk's own
        return result

    def see(
        self, input: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> None:
        """Take a call of torch.topk into account."""
        if not 0 < k < input.shape[dim] or not input.is_floating_point():
            return
        with torch._C.DisableTorchFunction():
            scores = input.detach().double().movedim(dim, -1)
            scores = scores.sort(-1, descending=largest).values.reshape(-1, scores.shape[-1])
            if self.mask is not None and len(scores) == self.mask.numel():
                scores = scores[self.mask.flatten() != 0]
            gaps = (scores[:, k - 1] - scores[:, k]).abs()
            spread = scores[scores.isfinite()].std()
            gaps = gaps[gaps.isfinite()]
            if gaps.numel() and spread > 0:
                self.least = min(self.least, float(gaps.min() / spread))


def clear_seed(model: torch.nn.Module, padding: str) -> int:
    """The seed of `example` on which a model's choices are clearest; 0 where it makes none.

    Args:
        model: in fp32; runs once for each of SEEDS inputs.
    """
    best, widest = 0, -1.0
    for seed in range(SEEDS):
        given = example(model, padding=padding, seed=seed)
        with torch.no_grad(), Margins(given.get("attention_mask")) as margins:
            model(**given)
        if margins.least == math.inf:
            return 0
        if margins.least > widest:
            best, widest = seed, margins.least
    return best
