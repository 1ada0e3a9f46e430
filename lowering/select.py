"""Choose for each op the first kernel of the target that does not refuse; its reference is always last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops, torch_private
from graphopt.kernel import GPU, Kernel
from graphopt.ledger import Ledger
from graphopt.observe import KernelChosen, Observer, emit
from graphopt.rewrite import Match, fake_result
from graphopt.targets import TARGETS

REFERENCE = "reference"
REFERENCES: dict[object, tuple[str, Callable[..., object]]] = {
    op.overload: (op.__name__, op.reference) for op in ops.OPS
}


def select(
    graph: fx.Graph,
    kernels: Sequence[Kernel],
    target: str,
    observers: Sequence[Observer] = (),
    deny: Set[str] = frozenset(),
    ledger: Ledger | None = None,
) -> int:
    """op(...) -> launch(...): each op's node calls its kernel's launcher instead; returns how many.

    Emits a `KernelChosen` for each node, with the refusals of the kernels tried before. The chosen name is
    kept in `meta["kernel"]`. Kernels whose `identity` at a node is denied are not chosen there.
    """
    by_op = for_target(kernels, target)
    chosen = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in REFERENCES:
            continue
        op, reference = REFERENCES[node.target]
        name, launch, reasons = choose(node, by_op.get(op, ()), reference, deny)
        before = ledger.took((node,)) if ledger else ()
        node.target = launch
        if ledger and name != REFERENCE:
            place, source = g.module_path(node), g.source(node)
            done = Match(identity(name, node), f"kernel {name}", place, source, (node.name,), (node.name,))
            ledger.changed(done, (launch,), before, node)
        node.meta["kernel"] = name
        emit(observers, KernelChosen(node.name, op, name, reasons))
        chosen += 1
    return chosen


def for_target(kernels: Sequence[Kernel], target: str) -> dict[str, list[Kernel]]:
    """Op -> the kernels that serve a target, in the table's order."""
    by_op: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        if kernel.target == target or (kernel.target == GPU and target in TARGETS):
            by_op.setdefault(kernel.op, []).append(kernel)
    return by_op


def identity(kernel: str, node: fx.Node) -> str:
    """A stable id of a kernel's choice: kernel @ module path # hash of what the call reads."""
    about = [f"{tuple(map(str, g.shape(n)))}{g.dtype(n)}" for n in g.inputs(node) if g.is_tensor(n)]
    digest = hashlib.sha1(";".join(about).encode(), usedforsecurity=False).hexdigest()[:6]
    return f"kernel {kernel}@{g.module_path(node) or '-'}#{digest}"


def choose(
    node: fx.Node,
    kernels: Sequence[Kernel],
    reference: Callable[..., object],
    deny: Set[str] = frozenset(),
) -> tuple[str, Callable[..., object], tuple[str, ...]]:
    """The kernel's name and launcher, and why the ones before it refused."""
    reasons: list[str] = []
    elsewhere = _elsewhere(node)
    for kernel in kernels:
        reason = elsewhere or kernel.refuses(node)
        if reason is None and deny and identity(kernel.name, node) in deny:
            reason = "denied"
        if reason is None:
            return kernel.name, kernel.launch, tuple(reasons)
        reasons.append(f"{kernel.name}: {reason}")
    return REFERENCE, reference, tuple(reasons)


def _elsewhere(node: fx.Node) -> str | None:
    """A kernel reads one device; torch's operators take a scalar from the CPU, too."""
    tensors = [n for n in g.inputs(node) if g.is_tensor(n)]
    for other in tensors[1:]:
        if g.device(other).type != g.device(tensors[0]).type:
            return f"{other.name} is on {g.device(other)}, {tensors[0].name} on {g.device(tensors[0])}"
    return None


def kernel_for(
    op: ops.Op[..., object], arguments: Sequence[object], kernels: Sequence[Kernel], target: str
) -> tuple[str, Callable[..., object]]:
    """The name and launcher that a call on these tensors and values would get; nothing runs."""
    mode = torch_private.new_fake_mode()
    graph = fx.Graph()
    nodes: list[object] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            node = graph.placeholder(f"arg{i}")
            g.set_val(node, torch_private.faked([argument], mode)[0])
            nodes.append(node)
        else:
            nodes.append(argument)
    node = graph.call_function(op.overload, tuple(nodes))  # type: ignore[arg-type]  # nodes and plain values
    g.set_val(node, fake_result(node))
    name, launch, _ = choose(node, for_target(kernels, target).get(op.__name__, ()), op.reference)
    return name, launch
