"""What a lowered program launches, found by running it on fake tensors: no GPU, no memory, no weights."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.errors import PipelineError
from graphopt.launch import Launch, recording
from graphopt.lowering.select import REFERENCE
from graphopt.targets import Target
from graphopt.weights import prepared_weights

# They say nothing of views in their schemas, and launch nothing.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


@dataclass(frozen=True)
class Step:
    """One call of a lowered program.

    Attributes:
        node: the call.
        launches: the Triton kernels that it launches.
        torch: how many operators of torch it runs that compute or copy: at least a launch each.
    """

    node: fx.Node
    launches: tuple[Launch, ...]
    torch: int

    @property
    def count(self) -> int:
        """How many launches this call takes; for a reference at least that many."""
        return len(self.launches) + self.torch

    @property
    def is_reference(self) -> bool:
        """Whether no kernel was found for an op, so that its definition runs."""
        return self.node.meta.get("kernel") == REFERENCE


def steps(gm: fx.GraphModule, target: Target) -> tuple[Step, ...]:
    """The calls of a lowered program that launch something, in order.

    Raises PipelineError where its shapes are not known: a launch's grid and configuration depend on them.
    """
    mode = torch_private.fake_mode_of([g.val(n) for n in g.placeholders(gm.graph)])
    for node in g.placeholders(gm.graph):
        sizes = g.shape(node) if g.is_tensor(node) else (g.val(node),)
        if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
            raise PipelineError(
                f"input {node.name} has no fixed shape ({g.val(node)}); compile it for fixed shapes"
            )
    found: list[Step] = []
    if mode is None:
        return ()
    with mode, torch.no_grad(), recording(target) as recorder:
        values: dict[fx.Node, object] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder" or node.target is prepared_weights:
                values[node] = g.val(node)
            elif node.op == "get_attr":
                (values[node],) = torch_private.faked([operator.attrgetter(str(node.target))(gm)], mode)
            elif node.op == "call_function":
                before = len(recorder.launches)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[arg-type]  # values
                run = partial(_call, node, args, kwargs, values)
                ran = torch_private.operators_run(run)
                launches = tuple(recorder.launches[before:])
                work = sum(_computes(operator) for operator in ran)
                if launches or work:
                    found.append(Step(node, launches, work))
    return tuple(found)


def _call(
    node: fx.Node, args: Sequence[object], kwargs: Mapping[str, object], values: dict[fx.Node, object]
) -> None:
    """Run one call on fakes and keep its result."""
    assert callable(node.target)
    values[node] = node.target(*args, **kwargs)


def _computes(overload: torch_private.OpOverload) -> bool:
    """Whether an operator does work on a device: views, bare allocations and questions of dtypes do none."""
    returned = [r for r in overload._schema.returns if "Tensor" in str(r.type)]
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
    return bool(returned) and not views and g.base_name(overload) not in FREE


def layer_of(path: str) -> str:
    """The repeated block that a module path lies in: "model.layers.3.mlp" -> "model.layers.3"; else ""."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found.group() if found else ""


def launches_per_layer(found: Sequence[Step]) -> dict[str, int]:
    """Block -> launches of one run, in the order in which blocks run; "" is what lies in none."""
    counted: Counter[str] = Counter()
    for step in found:
        counted[layer_of(g.module_path(step.node))] += step.count
    return dict(counted)
