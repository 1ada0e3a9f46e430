"""Choose for each op the first kernel of the target that does not refuse; its reference is always last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from graphopt import ops
from graphopt.kernel import GPU, Kernel
from graphopt.observe import KernelChosen, Observer, emit
from graphopt.targets import TARGETS

REFERENCE = "reference"
REFERENCES: dict[object, tuple[str, Callable[..., object]]] = {
    op.overload: (op.__name__, op.reference) for op in ops.OPS
}


def select(
    graph: fx.Graph, kernels: Sequence[Kernel], target: str, observers: Sequence[Observer] = ()
) -> int:
    """op(...) -> launch(...): each op's node calls its kernel's launcher instead; returns how many.

    Emits a `KernelChosen` for each node, with the refusals of the kernels tried before. The chosen name is
    kept in `meta["kernel"]`.
    """
    by_op: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.target == target or (kernel.target == GPU and target in TARGETS):
            by_op.setdefault(kernel.op, []).append(kernel)
    chosen = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in REFERENCES:
            continue
        op, reference = REFERENCES[node.target]
        name, launch, reasons = choose(node, by_op.get(op, ()), reference)
        node.target = launch
        node.meta["kernel"] = name
        emit(observers, KernelChosen(node.name, op, name, reasons))
        chosen += 1
    return chosen


def choose(
    node: fx.Node, kernels: Sequence[Kernel], reference: Callable[..., object]
) -> tuple[str, Callable[..., object], tuple[str, ...]]:
    """The kernel's name and launcher, and why the ones before it refused."""
    reasons: list[str] = []
    for kernel in kernels:
        reason = kernel.refuses(node)
        if reason is None:
            return kernel.name, kernel.launch, tuple(reasons)
        reasons.append(f"{kernel.name}: {reason}")
    return REFERENCE, reference, tuple(reasons)
