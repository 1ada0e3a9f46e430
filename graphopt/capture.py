"""The one door: a Dynamo graph, an exported program, a module or a plain function becomes one pre-dispatch
ATen graph.

capture(model, *args) -> Captured: a graph whose placeholders are the inputs and the *named* weights. The
graph owns no parameter: weights are bound at each call, because Dynamo runs one graph with many weight sets
(two instances of a class, `layer.compile()` on every layer, continuous batching).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.aliasing import written_inputs
from graphopt.autocast import ambient, outside
from graphopt.errors import CaptureRefused, ReleasedError, WeightError
from graphopt.ownership import WAY_OUT, is_stand_in
from graphopt.tracing import ROOT, Door, check_inputs, first_line, trace
from graphopt.weights import prepared_weights

Flat: TypeAlias = "list[object]"
Find: TypeAlias = "Callable[[str], object]"  # the tensor that a weight's name stands for now


@dataclass
class Captured:
    """A program on the road: `gm` runs on (inputs and weights in placeholder order); calling it binds them.

    Attributes:
        gm: the graph; placeholders with `meta["weight"]` are weights, the others are inputs.
        bind: turns the caller's arguments into the flat list of placeholder values.
        unflatten: turns the graph's flat outputs into what the original returned.
        mode: the fake mode of the values in `meta["val"]`.
        run: what executes the flat list; `gm` unless a lowering replaced it.
        autocast: whether it was captured under autocast. Its casts are in the graph: it runs without.
    """

    gm: fx.GraphModule
    bind: Callable[[tuple[object, ...], Mapping[str, object]], Flat]
    unflatten: Callable[[Sequence[object]], object]
    mode: torch_private.FakeTensorMode
    run: Callable[..., object] | None = None
    autocast: bool = field(default_factory=lambda: ambient() is not None)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run on the caller's arguments, with the weights the model holds now."""
        values = self.bind(args, kwargs)
        for node, value in zip(g.placeholders(self.gm.graph), values, strict=True):
            read = any(user.target is not prepared_weights for user in node.users)
            if read and isinstance(value, torch.nn.Parameter):
                _refuse_released(".".join(node.meta.get("weight", (node.name,))[:1]), value)
        return self.unflatten(self.runnable(self.gm)(*values))  # type: ignore[arg-type]  # a tuple

    def runnable(self, otherwise: Callable[..., object]) -> Callable[..., object]:
        """What executes the flat list: `run`, or what is given where there is none."""
        return outside(self.run or otherwise) if self.autocast else self.run or otherwise

    def replace(self, gm: fx.GraphModule, run: Callable[..., object] | None = None) -> Captured:
        """The same program with another graph."""
        return dataclasses.replace(self, gm=gm, run=run)


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object],
    *args: object,
    **kwargs: object,
) -> Captured:
    """Trace a model, an exported program or a plain function into a runnable ATen graph with named weights.

    Args:
        model: an `nn.Module` (called with `args`/`kwargs`; real, fake or meta tensors), an `ExportedProgram`
            (its own example shapes; no arguments), or a function of tensors.

    Raises:
        CaptureRefused: out of scope as a whole (unknown higher-order op, tensor subclass, sparse tensor,
            complex output, complex numbers in an unknown operator, data-dependent control flow, a cast by
            autocast that no argument shows), with the reason.
        ReleasedError: a weight was released (`optimize`).
    """
    if isinstance(model, torch.export.ExportedProgram):
        return from_exported(model)
    if isinstance(model, torch.nn.Module):
        return _from_module(model, args, kwargs)
    return _from_function(model, args, kwargs)


def from_dynamo(gm: fx.GraphModule, examples: Sequence[object]) -> Captured:
    """The graph that Dynamo hands to a backend, with the backend's example inputs. Must run inside the
    backend.
    """
    mode, fakes = torch_private.backend_fakes(examples)
    sources = [torch_private.dynamo_source(n) for n in gm.graph.nodes if n.op == "placeholder"]
    traced = trace(lambda *values: Door(gm).run(*values), fakes, mode)
    _name_weights(traced, _weight_names(sources))
    return Captured(
        traced, bind=lambda args, kwargs: list(args), unflatten=lambda outputs: outputs, mode=mode
    )


def from_exported(program: torch.export.ExportedProgram) -> Captured:
    """An exported program. Its state dict gives the weights at each call; mutated buffers are written in
    place.
    """
    state: dict[str, object] = {**program.constants, **program.state_dict}
    return _from_exported(program, state.__getitem__)


def _from_module(model: torch.nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Captured:
    """Export, then the same trace; at each call the weights are read from the live module by their names."""
    for name, p in model.named_parameters():
        _refuse_released(name, p)
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, dict(kwargs), strict=False)
    except CaptureRefused:
        raise
    except Exception as error:
        raise CaptureRefused(f"torch.export cannot trace it: {first_line(error)}") from error

    def find(name: str) -> object:
        parent, _, leaf = name.rpartition(".")
        try:
            return getattr(model.get_submodule(parent), leaf)
        except AttributeError:
            if name in program.constants:  # a tensor that is nobody's attribute
                return program.constants[name]
            raise WeightError(f"weight {name!r} is gone from the model; capture the model again") from None

    return _from_exported(program, find)


def _refuse_released(name: str, x: torch.Tensor) -> None:
    """What an optimized model has let go of cannot be read."""
    if is_stand_in(x):
        raise ReleasedError(
            f"weight {name} {list(x.shape)} was released when its prepared form was made: it cannot be "
            f"captured or run from a graph of it; {WAY_OUT}"
        )


def _from_exported(program: torch.export.ExportedProgram, find: Find) -> Captured:
    """An exported program whose weights, buffers and constants are found by name at each call."""
    signature = program.graph_signature
    if signature.inputs_to_lifted_custom_objs:
        taken = next(iter(signature.inputs_to_lifted_custom_objs.values()))
        raise CaptureRefused(f"it takes a custom object {taken!r}")
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named = {**stored, **signature.inputs_to_lifted_tensor_constants}
    fakes = [g.val(n) for n in placeholders]
    mode = torch_private.fake_mode_of(fakes) or torch_private.new_fake_mode()
    places = {n.name: i for i, n in enumerate(placeholders)} | {
        path: i for i, n in enumerate(placeholders) if (path := named.get(n.name))
    }
    kinds = [(spec.kind.name, spec.target) for spec in signature.output_specs]

    def run(*values: object) -> tuple[object, ...]:
        """The program with its mutations in place, where export has made them outputs."""
        results: Sequence[object] = Door(program.graph_module).run(*values)  # type: ignore[assignment]  # a tuple
        for (kind, target), value in zip(kinds, results, strict=True):
            if kind.endswith("_MUTATION"):
                values[places[target]].copy_(value)  # type: ignore[attr-defined]  # a tensor
        return tuple(v for (kind, _), v in zip(kinds, results, strict=True) if kind == "USER_OUTPUT")

    traced = trace(run, fakes, mode)
    tied: dict[int, tuple[str, ...]] = {}
    for name, tensor in program.state_dict.items():
        tied[id(tensor)] = (*tied.get(id(tensor), ()), name)
    names = [
        tied[id(program.state_dict[path])] if (path := stored.get(n.name, "")) in program.state_dict else ()
        for n in placeholders
    ]
    _name_weights(traced, names)
    sources = [named.get(n.name) for n in placeholders]
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec

    def bind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Flat:
        user = iter(_flatten(args, kwargs, in_spec))
        return [find(path) if path is not None else next(user) for path in sources]

    return Captured(traced, bind, lambda outputs: torch_private.tree_unflatten(outputs, out_spec), mode)


def _from_function(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Captured:
    """A plain function of tensors: every tensor argument is an input, what it closes over is a constant."""
    flat, in_spec = torch_private.tree_flatten((args, dict(kwargs)))
    check_inputs(flat)
    mode = torch_private.fake_mode_of(flat) or torch_private.new_fake_mode()
    out_spec: list[torch_private.TreeSpec] = []

    def flat_function(*values: object) -> tuple[object, ...]:
        call_args, call_kwargs = torch_private.tree_unflatten(values, in_spec)
        outputs, spec = torch_private.tree_flatten(function(*call_args, **call_kwargs))
        out_spec[:] = [spec]
        return tuple(outputs)

    traced = trace(flat_function, torch_private.faked(flat, mode), mode)
    return Captured(
        traced,
        bind=lambda args, kwargs: _flatten(args, kwargs, in_spec),
        unflatten=lambda outputs: torch_private.tree_unflatten(outputs, out_spec[0]),
        mode=mode,
    )


# ------------------------------------------------------------------------------------- arguments and names


def _flatten(
    args: tuple[object, ...], kwargs: Mapping[str, object], expected: torch_private.TreeSpec
) -> Flat:
    """The arguments of a call, flat; keyword arguments in the order in which they were captured."""
    _, names = expected.children()[1], expected.children()[1].context
    ordered = {k: kwargs[k] for k in names if k in kwargs} | dict(kwargs)
    flat, spec = torch_private.tree_flatten((args, ordered))
    if spec != expected:
        raise CaptureRefused(f"called with arguments of structure {spec}, captured with {expected}")
    return flat


# Hops of a Dynamo source that are no part of a weight's dotted name.
_HOPS = frozenset({"_modules", "_parameters", "_buffers", "__dict__", "_orig_mod"})


def _weight_names(sources: Sequence[str]) -> list[tuple[str, ...]]:
    """`L['self']._modules['fc']._parameters['weight']` -> ("fc.weight",); () for what is no weight.

    The root is part of a name where weights come from several: `G['a']…`, `G['b']…` -> "a.weight",
    "b.weight". A name that still occurs twice is numbered: Dynamo hands over each tensor once, so equal names
    are two weights.
    """
    ways = [_way(source) for source in sources]
    shared = len({way[0] for way in ways if way}) == 1
    seen: dict[str, int] = {}
    names: list[tuple[str, ...]] = []
    for way in ways:
        name = ".".join(way[1:] if shared else way)
        seen[name] = seen.get(name, 0) + 1
        names.append(((f"{name}#{seen[name]}" if seen[name] > 1 else name),) if way else ())
    return names


def _way(source: str) -> tuple[str, ...]:
    """The words of a parameter's or buffer's source, its root first; empty for any other source.

    The root may be an item: behind a decorator that takes `*args`, a module is `L['args'][0]`.
    """
    root = re.match(ROOT, source)
    if root is None or not re.search(r"\._(?:parameters|buffers)\['[^']+'\]$", source):
        return ()
    hops = (word for word in _words(source[root.end() :]) if word not in _HOPS)
    return (".".join(_words(root[0])), *hops)


def _words(source: str) -> list[str]:
    """The names and numbers of a source, or of a part of it."""
    return [a or b or c for a, b, c in re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)", source)]


def _name_weights(gm: fx.GraphModule, names: Sequence[tuple[str, ...]]) -> None:
    """Mark the placeholders that are weights, with readable names; one that the graph writes is an input
    instead.

    Equal names are one tensor (an exported program's tied weights): read from the first of the placeholders.
    """
    written = written_inputs(gm.graph)
    first: dict[tuple[str, ...], fx.Node] = {}
    for node, weight in zip(g.placeholders(gm.graph), names, strict=True):
        if not weight or node in written:
            continue
        if weight in first:
            node.replace_all_uses_with(first[weight])
            continue
        first[weight] = node
        g.set_weight_names(node, weight)
        with gm.graph.inserting_before(node):
            node._rename(re.sub(r"\W", "_", weight[0]))
    gm.recompile()
