"""What graphopt consists of: the tuples RULES, KERNELS and PIPELINE. The only file that sees every room."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.kernel import Kernel
from graphopt.kernels import attention as attention_kernels
from graphopt.kernels import (
    attention_split_triton,
    attention_triton,
    cache_triton,
    experts,
    layer_norm_triton,
    linear_triton,
    mlp_triton,
    rms_norm_triton,
    rope_triton,
)
from graphopt.kernels import cache as cache_kernels
from graphopt.kernels import layer_norm as layer_norm_kernels
from graphopt.kernels import linear as linear_kernels
from graphopt.kernels import linear_int8 as linear_int8_kernels
from graphopt.kernels import mlp as mlp_kernels
from graphopt.kernels import rms_norm as rms_norm_kernels
from graphopt.kernels import rope as rope_kernels
from graphopt.lowering.module import Lower
from graphopt.observe import Observer
from graphopt.options import Options
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.fuse import Fuse
from graphopt.passes.merge import Merge
from graphopt.passes.quantize import Quantize
from graphopt.passes.recognise import Recognise
from graphopt.passes.shard import Shard
from graphopt.patterns import (
    attention,
    attention_masks,
    attention_scores,
    cache,
    dense_experts,
    linear,
    mlp,
    moe,
    norm,
    rope,
    torch_ops,
)
from graphopt.pipeline import Context, Pass, Pipeline, passes_named
from graphopt.rule import Rule
from graphopt.targets import CPU, target_of
from graphopt.translate import Translation
from graphopt.weights import WeightStore

RULES: tuple[Rule | Translation, ...] = (
    *torch_ops.RULES,  # first: the others read what these make
    *norm.RULES,
    *rope.RULES,
    *mlp.RULES,
    *moe.RULES,  # after the activations that stand between its products
    *dense_experts.RULES,
    *linear.RULES,
    *attention_scores.RULES,
    *attention_masks.RULES,
    *attention.RULES,
    *cache.RULES,
)

KERNELS: tuple[Kernel, ...] = (
    *rms_norm_kernels.KERNELS,
    *layer_norm_kernels.KERNELS,
    *rope_kernels.KERNELS,
    *attention_kernels.KERNELS,
    *cache_kernels.KERNELS,
    *linear_kernels.KERNELS,
    *linear_int8_kernels.KERNELS,
    *mlp_kernels.KERNELS,
    *experts.KERNELS,
    *rms_norm_triton.KERNELS,
    *layer_norm_triton.KERNELS,
    *rope_triton.KERNELS,
    *cache_triton.KERNELS,
    *mlp_triton.KERNELS,
    *attention_split_triton.KERNELS,  # before attention_triton: few queries are its special case
    *attention_triton.KERNELS,
    *linear_triton.KERNELS,
)

PIPELINE: tuple[Pass, ...] = (
    Canonicalize(),
    Recognise(),
    Merge(),  # after structure is known, before anything looks at the size of a weight
    Lower(),
)


def context(
    options: Options | None = None,
    *,
    device: str | torch.device = "cpu",
    store: WeightStore | None = None,
    observers: Sequence[Observer] = (),
) -> Context:
    """A context with the default tables; `store` shares prepared weights with other graphs.

    `device` is where the program runs: it decides the target that the options leave open.
    """
    options = options or Options()
    return Context(
        store=store if store is not None else WeightStore(),
        target=target_for(options, device),
        replay=options.cuda_graphs,
        rules=RULES,
        kernels=KERNELS,
        observers=tuple(observers),
        strict=options.strict,
    )


def asked_for(options: Options, rank: int = 0) -> tuple[Pass, ...]:
    """The passes that run on request only, in their order: between Merge and what looks at kernels."""
    passes: list[Pass] = []
    if options.shard > 1:
        passes.append(Shard(options.shard, rank, plan=options.shard_plan))
    if options.quantize is not None:  # after Shard: groups and scales are a rank's own
        passes.append(Quantize(options.quantize, options.quantize_group, options.quantize_exclude))
    return tuple(passes)


def pipeline(
    options: Options | None = None,
    *,
    device: str | torch.device = "cpu",
    until: str | None = None,
    rank: int = 0,
) -> Pipeline:
    """The default passes that the options leave, up to the one named `until`, included.

    `device` is where the program runs, as for `context`; `rank` whose it is, where `shard` is more than one.
    """
    options = options or Options()
    at = passes_named(PIPELINE).index("merge") + 1
    passes = [p for p in PIPELINE[:at] if options.merge or p.name != "merge"]
    passes += asked_for(options, rank)
    if target_for(options, device) != CPU:
        passes.append(Fuse())  # the last of the transforms: it reads what all others have made
    passes += PIPELINE[at:]
    names = passes_named(passes)
    return Pipeline(tuple(passes[: names.index(until) + 1] if until else passes))


def target_for(options: Options, device: str | torch.device) -> str:
    """The target that the options name, or that serves the device."""
    return target_of(torch.device(device)) if options.target == "auto" else options.target
