"""What is taken away from compilations while a fault is looked for: matches, whole passes, kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from graphopt.observe import Observer
from graphopt.pipeline import Context, Pipeline


@dataclass(frozen=True)
class Steering:
    """Pipeline, Context -> the same without some rewrites.

    Attributes:
        deny: ids of matches that must not be applied.
        skip: names of passes that do not run.
        kernels: (op, kernel) names that may not be chosen; the op runs as the next kernel or its reference.
        observers: who listens besides the context's own.
    """

    deny: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()
    kernels: frozenset[tuple[str, str]] = frozenset()
    observers: tuple[Observer, ...] = ()

    @property
    def takes(self) -> bool:
        """Whether it takes anything away."""
        return bool(self.deny or self.skip or self.kernels)

    def steer(self, road: Pipeline, ctx: Context) -> tuple[Pipeline, Context]:
        """The pipeline and context to run instead; those that are given stay as they are.

        Raises:
            PipelineError: a pass that stays needs one that is skipped.
        """
        steered = copy.copy(ctx)
        steered.deny = ctx.deny | self.deny
        steered.kernels = tuple(k for k in ctx.kernels if (k.op, k.name) not in self.kernels)
        steered.observers = (*ctx.observers, *self.observers)
        return Pipeline(tuple(p for p in road.passes if p.name not in self.skip)), steered
