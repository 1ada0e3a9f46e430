"""Values of a program's nodes of any stage on real inputs: each computed once, let go after its last use.

What a rewrite made has the value of what it stands for: a wrong rewrite spoils no other's inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.ledger import Call, Ledger
from graphopt.ownership import is_stand_in


class Values:
    """Values for several askers, each of whom asks once, for the nodes that were announced.

    Args:
        ledger: what each node computes.
        inputs: the program's arguments. They are never written: calls that would are run on copies.
        wanted: what each asker is going to ask for.

    Attributes:
        held: the bytes of what is computed and still needed.
        made_up: places of the inputs whose values are random, because the weight's memory was released.
    """

    def __init__(self, ledger: Ledger, inputs: Sequence[object], wanted: Sequence[Sequence[fx.Node]]) -> None:
        self.ledger = ledger
        self.inputs = inputs
        self.held = 0
        self.made_up: dict[int, torch.Tensor] = {}
        self._known: dict[fx.Node, Any] = {}
        self._left: Counter[fx.Node] = Counter()
        seen: set[fx.Node] = set()
        for nodes in wanted:
            self._left.update({self.captured(n) for n in nodes})
            for node in self._missing(nodes, seen):
                seen.add(node)
                self._left.update(self._reads(node))

    def captured(self, node: fx.Node) -> fx.Node:
        """The node whose call gives a node's value."""
        while node in self.ledger.same:
            node = self.ledger.same[node]
        return node

    def take(self, nodes: Sequence[fx.Node]) -> list[object]:
        """The values of nodes that one asker wanted. Raises what a call raises."""
        for node in self._missing(nodes, self._known.keys()):
            call = self.ledger.calls[node]
            value = run_call(call, lambda n: self._at(self.captured(n)))
            self._known[node] = value
            self.held += nbytes(value)
            for read in self._reads(node):
                self._used(read)
        roots = [self.captured(n) for n in nodes]
        values = [self._at(n) for n in roots]
        for node in dict.fromkeys(roots):
            self._used(node)
        return values

    def _missing(self, nodes: Sequence[fx.Node], known: object) -> list[fx.Node]:
        """The calls that are still to run for some nodes, in order."""
        order: dict[fx.Node, None] = {}
        todo = [(self.captured(n), False) for n in reversed(nodes)]
        while todo:
            node, ready = todo.pop()
            if node in order or node in known or node not in self.ledger.calls:  # type: ignore[operator]  # a set
                continue
            if ready:
                order[node] = None
            else:
                todo.append((node, True))
                todo += [(read, False) for read in reversed(self._reads(node))]
        return list(order)

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        return list(dict.fromkeys(map(self.captured, self.ledger.calls[node].reads())))

    def _at(self, node: fx.Node) -> object:
        """The value of an input, a constant, or a call that has run."""
        if node in self.ledger.inputs:
            return self._input(self.ledger.inputs[node])
        if node in self.ledger.constants:
            return self.ledger.constants[node]
        return self._known[node]

    def _input(self, i: int) -> object:
        given = self.inputs[i]
        if not isinstance(given, torch.Tensor):
            return given
        if is_stand_in(given):
            if i not in self.made_up:
                self.made_up[i] = _made_up(given, i)
            return self.made_up[i]
        return given.detach()

    def _used(self, node: fx.Node) -> None:
        """One use less is left of a value."""
        self._left[node] -= 1
        if self._left[node] <= 0 and node in self._known:
            self.held -= nbytes(self._known.pop(node))


def run_call(call: Call, value: Any) -> Any:
    """The result of one call; what it writes are copies."""
    args, kwargs = call.given(value)
    if g.is_mutable(call.target):
        args, kwargs = copied(args), copied(kwargs)
    return call.target(*args, **kwargs)


def copied(value: Any) -> Any:
    """Nested values with each tensor copied, in its layout."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(v) for key, v in value.items()}
    return type(value)(copied(v) for v in value) if type(value) in (list, tuple) else value


def nbytes(value: object) -> int:
    """The bytes of the tensors in a value; views count as if they were copies."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


def _made_up(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A weight of that shape that keeps activations at their scale; the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator) / math.sqrt(max(1, x.shape[-1]))
    return noise.to(x.device, x.dtype)
