"""The one trace: any recorded program, run on fakes, becomes pre-dispatch ATen with its provenance on every
node.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import fx

from graphopt import autocast, torch_private
from graphopt import graph as g
from graphopt.batching import DERIVATIVES, Batched, batched_regions
from graphopt.complex_values import complex_refusal
from graphopt.errors import CaptureRefused

# Where a source of Dynamo begins: a variable, or an item of one (`L['args'][0]`: forward has a decorator).
ROOT = r"[LG]\['\w+'\](?:\[\d+\])*"

# Calls that are recorded and that mean nothing for inference. `inference_mode` inside a graph only marks
# tensors.
_IGNORED = frozenset(
    {
        "_log_api_usage_once",
        "_set_grad_enabled",
        "set_grad_enabled",
        "_enter_inference_mode",
        "_exit_inference_mode",
    }
)
# Higher-order operators whose body is simply run in place -> where their body stands among the arguments.
_DISSOLVED = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
# Operators that write to arguments which their schema calls read-only -> the argument that says whether they
# do.
_UNDECLARED_WRITES = {
    torch.ops.aten.batch_norm.default: "training",
    torch.ops.aten.native_batch_norm.default: "training",
    torch.ops.aten.instance_norm.default: "use_input_stats",
}


class Door(fx.Interpreter):
    """Runs a recorded graph under the tracer: regions dissolve, what is out of scope is refused by name.

    Autocast regions are really entered, and recorded for `autocast.make_explicit`. What `torch.vmap` has
    batched becomes the operators that run below it: the tracer would not see through its wrapped tensors.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._regions: list[torch.autocast] = []
        self._batched = {region.nodes[0]: region for region in batched_regions(gm)}
        self._inside = {node for region in self._batched.values() for node in region.nodes}
        self._given: dict[fx.Node, object] = {}  # what batched regions have given

    def run(self, *args: object, **kwargs: object) -> object:
        """As fx's; a region that an error leaves open is left."""
        try:
            return super().run(*args, **kwargs)  # type: ignore[arg-type]  # any arguments
        finally:
            while self._regions:
                self._regions.pop().__exit__(None, None, None)

    def run_node(self, n: fx.Node) -> object:
        """As fx's; a batched region runs as a whole where it begins."""
        if n in self._batched:
            region = self._batched[n]
            values = self._run_batched(region, [self.env[node] for node in region.reads])
            self._given.update(zip(region.gives, values, strict=True))
        return self._given.get(n) if n in self._inside else super().run_node(n)

    def _run_batched(self, region: Batched, values: Sequence[object]) -> Sequence[object]:
        """vmap(f)(x) -> f written for batches. Its casts by autocast are in what was recorded below vmap."""
        below = torch_private.trace_below_vmap(_Unbatched(region.body).run, values)
        cast = autocast.ambient() is not None
        with autocast.within(None) if cast else contextlib.nullcontext():
            return fx.Interpreter(below).run(*values)

    def call_function(self, target: object, args: tuple, kwargs: dict) -> object:
        """As fx's, but for modes, regions and higher-order operators."""
        name = getattr(target, "__name__", str(target))
        if name in _IGNORED:
            return None
        if name == autocast.ENTER:
            self._regions.append(autocast.region(*args))
            return self._regions[-1].__enter__()
        if name == autocast.EXIT:
            return self._regions.pop().__exit__(None, None, None)
        if name == "_get_data_attr":  # `x.data`; the tracer would lose sight of it
            return args[0].detach()
        if name in DERIVATIVES:
            raise CaptureRefused(f"a derivative is taken ({DERIVATIVES[name]}), which is not supported")
        if torch_private.is_higher_order(target):
            if name not in _DISSOLVED:
                raise CaptureRefused(f"the higher-order operator {name!r} is not supported")
            region = autocast.region(*args[:4]) if name == "wrap_with_autocast" else contextlib.nullcontext()
            body = args[_DISSOLVED[name]]
            with region:
                return type(self)(body).run(*args[_DISSOLVED[name] + 1 :])
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]  # fx checks it


class _Unbatched(Door):
    """The body of a batched region: here vmap is really entered."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._batched, self._inside = {}, set()


def trace(
    function: Callable[..., object], fakes: Sequence[object], mode: torch_private.FakeTensorMode
) -> fx.GraphModule:
    """Run a function on fakes under the pre-dispatch tracer.

    Raises:
        CaptureRefused: the function fails on fakes, or does what no pass understands.
    """
    check_inputs(fakes)
    around = autocast.ambient()
    try:
        with autocast.within(around):
            traced = torch_private.trace(function, fakes, mode)
    except CaptureRefused:
        raise
    except Exception as error:
        raise CaptureRefused(f"tracing failed: {first_line(error)}") from error
    autocast.make_explicit(traced, around, mode)
    _dissolve(traced.graph)
    for node in traced.graph.nodes:
        node.meta["module_path"] = _module_path(node)
        node.meta["source"] = source_line(
            node.meta.get("stack_trace") or "", node.meta.get("nn_module_stack") or {}
        )
        _check_node(traced, node)
    traced.recompile()
    return traced


def _dissolve(graph: fx.Graph) -> None:
    """Drop modes that a plain function entered."""
    for node in reversed(graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _IGNORED or name in (autocast.ENTER, autocast.EXIT):
            graph.erase_node(node)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# ------------------------------------------------------------------------------------------------ refusals


def check_inputs(values: Sequence[object]) -> None:
    """Refuse what no pass understands, before anything is traced."""
    for value in values:
        if not isinstance(value, torch.Tensor):
            continue
        if torch_private.is_traceable_subclass(value):
            raise CaptureRefused(f"an input is a tensor subclass, {type(value).__name__}")
        if value.layout is not torch.strided:
            raise CaptureRefused(f"an input has layout {value.layout}; only torch.strided is supported")
        if value.is_quantized:
            raise CaptureRefused(f"an input has the quantized dtype {value.dtype}")
    autocast.refuse_other_ambient({v.device.type for v in values if isinstance(v, torch.Tensor)})


def _check_node(gm: fx.GraphModule, node: fx.Node) -> None:
    """Refuse a value that no pass understands, and a write that no schema tells of."""
    if torch_private.is_higher_order(node.target):
        raise CaptureRefused(f"the higher-order operator {node.target.__name__!r} is not supported")  # type: ignore[union-attr]  # a callable
    value = g.val(node)
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, torch.Tensor) and one.layout is not torch.strided:
            raise CaptureRefused(
                f"{node.name} ({node.target}) has layout {one.layout}, which no pass understands"
            )
    if (reason := complex_refusal(node)) is not None:
        raise CaptureRefused(reason)
    if node.op == "get_attr":
        constant = getattr(gm, str(node.target))
        if isinstance(constant, torch_private.FakeTensor):
            raise CaptureRefused(
                f"a tensor of unknown origin is read ({node.name}); the tracer has lost sight of it"
            )
        if torch_private.is_traceable_subclass(constant):
            raise CaptureRefused(f"a constant is a tensor subclass, {type(constant).__name__}")
    flag = _UNDECLARED_WRITES.get(node.target)  # type: ignore[call-overload]  # any target may be asked for
    if flag is not None and g.arg(node, flag) and g.arg(node, "running_mean") is not None:
        raise CaptureRefused(
            f"{node.target} in training mode updates its running statistics; call model.eval()"
        )


# ---------------------------------------------------------------------------------------------- provenance


def _module_path(node: fx.Node) -> str:
    """The path of the innermost module, without what Dynamo and `torch.compile` put around it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = re.sub(rf"^{ROOT}\.?|^L__\w+?\.", "", path)
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return ".".join(part for part in path.split(".") if part and part != "_orig_mod")


def source_line(stack_trace: str, modules: Mapping[str, tuple[str, object]]) -> str:
    """`file.py:12 code`: the innermost frame in the file of the model, not in that of a library it calls.

    That file is the one which most of the modules around the node are defined in, the innermost of equals:
    a linear is made in torch's file and attention in an integration's, but they are written down in the
    model's. Without modules it is the innermost frame outside of torch.

    Args:
        stack_trace: frames as Python prints them, outermost first.
        modules: fx's `nn_module_stack`: key -> (path, class or its qualified name), outermost first.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    if not frames:
        return ""
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    files = [f for _, kind in modules.values() if (f := _file_of(kind)) and not f.startswith(_TORCH)]
    counted = Counter(reversed(files))  # the first of equals is the innermost
    modelling = [frame for frame in own if counted and frame[0] == counted.most_common(1)[0][0]]
    file, line, code = (modelling or own or frames)[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} {code.strip()}"


_TORCH = f"{Path(torch.__file__).parent}/"


def _file_of(kind: object) -> str:
    """The file that defines a class, given it or its qualified name; empty where it has none."""
    name = kind.__module__ if isinstance(kind, type) else str(kind).rpartition(".")[0]
    return getattr(sys.modules.get(name), "__file__", None) or ""
