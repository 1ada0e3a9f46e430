"""Random weights that let errors show: attention logits with a standard deviation of 2, outputs of 1.

With the usual initialisation (0.02) softmax forgets k and q, and a wrong mask moves outputs by 0.01.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from graphopt.tools.zoo.census import watching

NORM_NOISE, BIAS_NOISE = 0.2, 0.3
LOGIT_STD, OUTPUT_STD = 2.0, 1.0
ROUNDS = 3  # each layer's scale moves the later layers' inputs a little; a softcap bends the proportion
PROPORTIONAL = 0.4  # an elasticity from which on a weight is said to scale something
FACTOR = 8.0  # most that one round changes a weight by


def fill(model: nn.Module) -> None:
    """Unit gain: constants (norms at 1, or at 0 where 1 is added) get noise, matrices 1/sqrt(inputs)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape)
            flat = parameter.flatten()
            constant = bool((flat == flat[:1]).all())
            if parameter.dim() >= 2:
                parameter.data.copy_(noise / _inputs(module, parameter) ** 0.5)
            elif name == "weight" and constant:
                parameter.data.add_((NORM_NOISE * noise).to(parameter.dtype))
            elif name == "bias" or constant:
                parameter.data.add_((BIAS_NOISE * noise).to(parameter.dtype))


def _inputs(module: nn.Module, parameter: torch.Tensor) -> int:
    """How many products are summed into one output."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return max(parameter[0].numel(), 1)
    conv = type(module).__name__ == "Conv1D"  # [in, out]
    return max(parameter.shape[0 if conv else -1], 1)


def scale(model: nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    """Scale weights in place until logits and outputs have their standard deviations.

    Which weight the logits of an attention are proportional to is found by a derivative: the elasticity of
    their mean square, d log / d log(weight), of the last weight for which it is large.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    for p in weights:
        p.requires_grad_(True)
    try:
        for _ in range(ROUNDS):
            with torch.enable_grad():
                with watching(model) as seen:
                    outputs = model(**given)
                targets = [(x, LOGIT_STD) for x in seen.logits if x.numel() > 1 and x.requires_grad]
                targets += [(x, OUTPUT_STD) for x in _floats(outputs)[:1] if x.requires_grad]
                try:
                    changes = [_change(x, wanted, weights) for x, wanted in targets]
                except AssertionError:  # reversible layers have gradients in training only: unit gain stays
                    return
            for weight, factor in filter(None, changes):
                weight.data.mul_(factor)
    finally:
        for p in weights:
            p.requires_grad_(False)


def _change(
    x: torch.Tensor, wanted: float, weights: Sequence[nn.Parameter]
) -> tuple[nn.Parameter, float] | None:
    """(weight, factor) that brings the standard deviation of a value nearer to the wanted one."""
    power = x.double().square().sum()
    if not torch.isfinite(power) or power == 0:
        return None
    gradients = torch.autograd.grad(power / 2, weights, allow_unused=True, retain_graph=True)
    for weight, gradient in reversed(list(zip(weights, gradients, strict=True))):
        if gradient is None or (weight.dim() < 2 and not bool((weight != 0).any())):
            continue
        elasticity = float((gradient.double() * weight.double()).detach().sum() / power.detach())
        if PROPORTIONAL <= elasticity <= 4:
            factor = (wanted / float(x.detach().std())) ** (1 / elasticity)
            return weight, min(max(factor, 1 / FACTOR), FACTOR)
    return None


def _floats(outputs: object) -> list[torch.Tensor]:
    values = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
    return [x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]


def in_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """A model in another dtype, in place, as a checkpoint loads it: what is kept in fp32 stays.

    A buffer gets the dtype that its class gives it in a model of this dtype: rotary frequencies stay in fp32,
    tables of positions and statistics of a batch norm do not.
    """
    kept_parts = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in path for part in kept_parts):
            parameter.data = parameter.data.to(dtype)
    config = getattr(model, "config", None)
    if config is None:
        return
    made = _buffers(type(model), config, dtype)
    for path, buffer in model.named_buffers():
        if buffer.is_floating_point() and path in made and not any(part in path for part in kept_parts):
            buffer.data = buffer.data.to(made[path])
    config.dtype = dtype


def _buffers(kind: type[nn.Module], config: object, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Path -> dtype of the buffers of a new model, made while a dtype is the default one."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return {path: buffer.dtype for path, buffer in kind(copy.deepcopy(config)).named_buffers()}
    finally:
        torch.set_default_dtype(usual)
