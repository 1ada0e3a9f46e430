"""The one door: a Dynamo graph, an exported program, a module or a plain function becomes one pre-dispatch ATen graph.

capture(model, *args) -> Captured: a graph whose placeholders are the inputs and the *named* weights. The graph owns no
parameter: weights are bound at each call, because Dynamo runs one graph with many weight sets (two instances of a class,
`layer.compile()` on every layer, continuous batching).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import torch_private
from graphopt.errors import CaptureRefused, WeightError

Flat: TypeAlias = "list[object]"

# Calls that Dynamo records and that mean nothing for inference.
_IGNORED_CALLS = frozenset({"_log_api_usage_once", "_set_grad_enabled", "set_grad_enabled"})
# Higher-order ops whose body is simply run in place: a region's grad mode dissolves.
_DISSOLVED = frozenset({"wrap_with_set_grad_enabled"})


@dataclass
class Captured:
    """A program on the road: `gm` runs on (inputs and weights in placeholder order); calling it binds them.

    Attributes:
        gm: the graph; placeholders with `meta["weight"]` are weights, the others are inputs.
        bind: turns the caller's arguments into the flat list of placeholder values.
        unflatten: turns the graph's flat outputs into what the original returned.
        mode: the fake mode of the values in `meta["val"]`.
        run: what executes the flat list; `gm` unless a lowering replaced it.
    """

    gm: fx.GraphModule
    bind: Callable[[tuple[object, ...], Mapping[str, object]], Flat]
    unflatten: Callable[[Sequence[object]], object]
    mode: torch_private.FakeTensorMode
    run: Callable[..., object] | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run on the caller's arguments, with the weights the model holds now."""
        return self.unflatten((self.run or self.gm)(*self.bind(args, kwargs)))  # type: ignore[arg-type]  # a tuple

    def replace(self, gm: fx.GraphModule, run: Callable[..., object] | None = None) -> Captured:
        """The same program with another graph."""
        return dataclasses.replace(self, gm=gm, run=run)


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., object], *args: object, **kwargs: object
) -> Captured:
    """Trace a model, an exported program or a plain function into a runnable ATen graph with named weights.

    Args:
        model: an `nn.Module` (called with `args`/`kwargs`; real, fake or meta tensors), an `ExportedProgram`
            (its own example shapes; no arguments), or a function of tensors.

    Raises:
        CaptureRefused: out of scope as a whole (unknown higher-order op, tensor subclass, sparse or complex tensor,
            enabled autocast, data-dependent control flow), with the reason.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return from_exported(model)
    if isinstance(model, torch.nn.Module):
        return _from_module(model, args, kwargs)
    return _from_function(model, args, kwargs)


def from_dynamo(gm: fx.GraphModule, examples: Sequence[object]) -> Captured:
    """The graph that Dynamo hands to a backend, with the backend's example inputs. Must run inside the backend."""
    mode, fakes = torch_private.backend_fakes(examples)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    written = _written_placeholders(gm)
    names = [
        () if node in written else _weight_name(torch_private.dynamo_source(node)) for node in placeholders
    ]
    traced = _trace(gm, fakes, mode)
    _name_weights(traced, names)
    return Captured(traced, bind=lambda args, kwargs: list(args), unflatten=lambda outputs: outputs, mode=mode)


def from_exported(program: torch.export.ExportedProgram) -> Captured:
    """An exported program. Its state dict gives the weights at each call; mutated buffers are written in place."""
    signature = program.graph_signature
    state: dict[str, object] = {**program.state_dict, **program.constants}
    mutated = set(signature.buffers_to_mutate.values())
    tied: dict[int, list[str]] = {}
    for name, tensor in program.state_dict.items():
        tied.setdefault(id(tensor), []).append(name)
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    weight_of = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**signature.inputs_to_lifted_tensor_constants}
    if signature.inputs_to_lifted_custom_objs:
        raise CaptureRefused(f"it takes a custom object {next(iter(signature.inputs_to_lifted_custom_objs.values()))!r}")
    sources = [weight_of.get(n.name) or constants.get(n.name) for n in placeholders]
    names: list[tuple[str, ...]] = []
    for node, path in zip(placeholders, sources, strict=True):
        fixed = node.name in weight_of and path is not None and path not in mutated and path in program.state_dict
        names.append(tuple(tied.get(id(program.state_dict[path]), [path])) if fixed and path is not None else ())
    fakes = [n.meta.get("val") for n in placeholders]
    mode = torch_private.fake_mode_of(fakes) or torch_private.new_fake_mode()
    traced = _trace(program.graph_module, fakes, mode)
    _name_weights(traced, names)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    n_mutations = len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate)
    writes = tuple(signature.buffers_to_mutate.values())

    def bind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Flat:
        flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        if in_spec is not None and spec != in_spec:
            raise CaptureRefused(f"called with arguments of structure {spec}, captured with {in_spec}")
        user = iter(flat)
        return [state[path] if path is not None else next(user) for path in sources]

    def unflatten(outputs: Sequence[object]) -> object:
        flat = list(outputs)
        for path, value in zip(writes, flat, strict=False):
            torch.Tensor.copy_(state[path], value)  # type: ignore[arg-type]  # state holds tensors
        return pytree.tree_unflatten(flat[n_mutations:], out_spec) if out_spec is not None else tuple(flat)

    return Captured(traced, bind, unflatten, mode)


def _from_module(model: torch.nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Captured:
    """Export, then the same trace; at each call the weights are read from the live module by their names."""
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, dict(kwargs), strict=False)
    except CaptureRefused:
        raise
    except Exception as error:
        raise CaptureRefused(f"torch.export cannot trace it: {_first_line(error)}") from error
    captured = from_exported(program)
    inner = captured.bind
    holders: dict[str, tuple[torch.nn.Module, str]] = {}
    for path in {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}:
        parent, _, leaf = path.rpartition(".")
        holders[path] = (model.get_submodule(parent), leaf)
    weights = [(i, n.meta["weight"][0]) for i, n in enumerate(_placeholders(captured.gm)) if n.meta.get("weight")]

    def bind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Flat:
        flat = inner(args, kwargs)
        for i, name in weights:
            owner, leaf = holders.get(name, (None, ""))
            if owner is None or getattr(owner, leaf, None) is None:
                raise WeightError(f"weight {name!r} is gone from the model; capture the model again")
            flat[i] = getattr(owner, leaf)
        return flat

    return dataclasses.replace(captured, bind=bind)


def _from_function(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Captured:
    """A plain function of tensors: every tensor argument is an input, what it closes over is a constant."""
    flat, in_spec = pytree.tree_flatten((args, dict(kwargs)))
    mode = torch_private.fake_mode_of(flat) or torch_private.new_fake_mode()
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) and not _is_fake(x) else x for x in flat]
    out_spec: list[pytree.TreeSpec] = []

    def flat_function(*values: object) -> tuple[object, ...]:
        call_args, call_kwargs = pytree.tree_unflatten(list(values), in_spec)
        outputs, spec = pytree.tree_flatten(function(*call_args, **call_kwargs))
        out_spec[:] = [spec]
        return tuple(outputs)

    _check_inputs(fakes)
    try:
        traced = torch_private.trace(flat_function, fakes, mode)
    except CaptureRefused:
        raise
    except Exception as error:
        raise CaptureRefused(f"tracing failed: {_first_line(error)}") from error
    _finish(traced)

    def bind(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Flat:
        values, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != in_spec:
            raise CaptureRefused(f"called with arguments of structure {spec}, captured with {in_spec}")
        return values

    return Captured(traced, bind, lambda outputs: pytree.tree_unflatten(list(outputs), out_spec[0]), mode)


# ------------------------------------------------------------------------------------------- the one trace


class _Door(fx.Interpreter):
    """Runs a recorded graph under the tracer: regions dissolve, what is out of scope is refused by name."""

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:  # type: ignore[override, type-arg]  # fx's own signature is loose
        name = getattr(target, "__name__", str(target))
        if name in _IGNORED_CALLS:
            return None
        if name == "_enter_autocast":
            _refuse_enabled_autocast(args)
            return None
        if name == "_exit_autocast":
            return None
        if torch_private.is_higher_order(target):
            if name in _DISSOLVED:
                return type(self)(args[1]).run(*args[2:])
            raise CaptureRefused(f"the higher-order operator {name!r} is not supported")
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]  # fx checks it


def _trace(gm: fx.GraphModule, fakes: Sequence[object], mode: torch_private.FakeTensorMode) -> fx.GraphModule:
    """Interpret a torch-level or ATen graph on fakes under the pre-dispatch tracer."""
    _check_inputs(fakes)
    try:
        traced = torch_private.trace(lambda *values: _Door(gm).run(*values), fakes, mode)
    except CaptureRefused:
        raise
    except Exception as error:
        raise CaptureRefused(f"tracing failed: {_first_line(error)}") from error
    _finish(traced)
    return traced


def _check_inputs(values: Sequence[object]) -> None:
    """Refuse what no pass understands, before anything is traced."""
    for value in values:
        if not isinstance(value, torch.Tensor):
            continue
        if torch_private.is_traceable_subclass(value):
            raise CaptureRefused(f"an input is a tensor subclass, {type(value).__name__}")
        if value.layout is not torch.strided:
            raise CaptureRefused(f"an input has layout {value.layout}; only torch.strided is supported")
        if value.dtype.is_complex:
            raise CaptureRefused(f"an input has dtype {value.dtype}; complex tensors are not supported")
        if value.is_quantized:
            raise CaptureRefused(f"an input has the quantized dtype {value.dtype}")
        if torch.is_autocast_enabled(value.device.type):
            raise CaptureRefused(
                f"autocast to {torch.get_autocast_dtype(value.device.type)} is on around the call; "
                "convert the model with model.to(dtype) instead"
            )


def _refuse_enabled_autocast(args: tuple[object, ...]) -> None:
    """Autocast that is on inside the graph: its casts happen below the tracer, so what it records would be wrong."""
    device, dtype, enabled = (*args, None, None, True)[:3]
    if enabled:
        raise CaptureRefused(f"a region runs under autocast({device!r}, {dtype}); convert the model with model.to(dtype)")


def _finish(gm: fx.GraphModule) -> None:
    """Put module path and source line on every node, and refuse values that no pass understands."""
    for node in gm.graph.nodes:
        node.meta["module_path"] = _module_path(node)
        node.meta["source"] = _source_line(node.meta.get("stack_trace") or "")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.dtype.is_complex or value.layout is not torch.strided):
            kind = f"dtype {value.dtype}" if value.dtype.is_complex else f"layout {value.layout}"
            raise CaptureRefused(f"{node.name} ({node.target}) has {kind}, which no pass understands")


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"^L\['\w+'\]\.?|^L__\w+?\.", "", path)
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return path.replace("_orig_mod.", "").replace("._orig_mod", "")


def _source_line(stack_trace: str) -> str:
    """`file.py:12 code` of the innermost frame."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} {code.strip()}"


def _weight_name(source: str) -> tuple[str, ...]:
    """`L['self']._modules['fc']._parameters['weight']` -> ("fc.weight",); () for what is no parameter or buffer."""
    parts = re.findall(r"_modules\['([^']+)'\]|_(?:parameters|buffers)\['([^']+)'\]$", source)
    if not parts or not parts[-1][1]:
        return ()
    path = [a or b for a, b in parts if (a or b) != "_orig_mod"]
    return (".".join(path),)


def _written_placeholders(gm: fx.GraphModule) -> set[fx.Node]:
    """Placeholders that some call of a Dynamo graph may write, directly or through a view: never weights.

    Conservative and by name, as torch-level calls have no schema: any method or function ending in `_`, `out=`, and
    `__setitem__` writes its first argument and everything that argument may be a view of.
    """
    written: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op not in ("call_method", "call_function"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "__setitem__")
        targets = [node.args[0]] if writes and node.args else []
        targets.append(node.kwargs.get("out"))
        for target in targets:
            while isinstance(target, fx.Node) and target not in written:
                written.add(target)
                target = target.args[0] if target.op != "placeholder" and target.args else None
    return written


def _name_weights(gm: fx.GraphModule, names: Sequence[tuple[str, ...]]) -> None:
    """Mark placeholders as weights and give them readable names in the printed code."""
    for node, weight in zip(_placeholders(gm), names, strict=True):
        if not weight:
            continue
        node.meta["weight"] = weight
        with gm.graph.inserting_before(node):
            node._rename(re.sub(r"\W", "_", weight[0]))
    gm.recompile()


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _is_fake(value: object) -> bool:
    return isinstance(value, torch_private.FakeTensor)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
