"""What an eager run of a model contains, seen from outside: counts that share nothing with the rules.

Attentions are calls of scaled_dot_product_attention, and softmaxes between a product of two activations and
another one. Norms are modules of that name whose output forgets the scale of each row. An MLP is a call of an
activation function. A rope is a module that calls a function named after rotation. Experts are modules of
that name, or with a list of that name, or with products of that name: modules with one matrix each.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

ADDS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm", "mm"})
WEIGHED = frozenset({"linear", "addmm", "conv1d", "conv2d", "conv3d", "embedding"})  # x with a weight
ACTIVATIONS = ("gelu", "silu", "relu", "swish", "mish")  # in a class's name; a pooler's tanh is no MLP
ACTIVATE = frozenset({"gelu", "silu", "relu", "relu_", "relu6", "mish", "hardswish"})  # functions
NORMALISE = frozenset({"layer_norm", "rms_norm"})
ROTATE = ("apply_rotary", "apply_rope", "apply_multimodal_rotary")  # a modeling file's functions begin so
LINEARS = ("Linear", "Conv1D")  # Conv1D: GPT-2's linear, its weight transposed
HIDDEN = -1e4  # what a mask adds is lower

# What a report's counts are called here: several ops of the vocabulary are one thing of the model.
OPS_OF: Mapping[str, tuple[str, ...]] = {
    "norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    "norm of a sum": ("add_rms_norm", "add_layer_norm"),
    "rope": ("rope",),
    "attention": ("attention", "attention_lse"),
    "mlp": ("gated_activation", "activation"),
    "experts": ("experts",),
    "linear": ("linear", "linear_int8", "fused_linear"),
}

WEIGHT, PRODUCT = "weight", "product"  # marks of values; a softmax over scores marks by its number


@dataclass
class Census(TorchFunctionMode):
    """The calls of an eager run: `counts` by the names of OPS_OF, the visible `logits` of each attention."""

    counts: Counter[str] = field(default_factory=Counter)
    logits: list[torch.Tensor] = field(default_factory=list)
    marks: dict[int, frozenset[object]] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)  # while they live, no id is used again
    sums: dict[int, torch.Tensor] = field(default_factory=dict)  # by address
    softmaxes: dict[object, torch.Tensor] = field(default_factory=dict)  # that no product has read so far
    inside: Counter[str] = field(default_factory=Counter)  # depth in norms, activations, experts
    modules: list[int] = field(default_factory=list)  # numbers of the calls that are running
    calls: int = 0
    rotating: set[int] = field(default_factory=set)
    normalising: dict[nn.Module, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Note what a call is and where its operands come from; change nothing."""
        given = kwargs or {}
        result = func(*args, **given)
        operands = list(_tensors((*args, *given.values())))
        if operands:
            marks = self._note(getattr(func, "__name__", ""), operands, args, given, result)
            self._mark(result, marks)
        return result

    def _note(
        self,
        name: str,
        operands: Sequence[torch.Tensor],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        result: object,
    ) -> frozenset[object]:
        """Count a call; returns the marks of its result."""
        each = [self._marks(x) for x in operands]
        marks = frozenset().union(*each)
        if name == "scaled_dot_product_attention":
            self._attention(_sdpa_logits(*args, **kwargs))  # type: ignore[arg-type]  # as it was called
            return frozenset()
        if name in WEIGHED or (name in PRODUCTS and any(WEIGHT in m for m in each)):
            return frozenset()
        if name in PRODUCTS:
            for number in marks & self.softmaxes.keys():
                self._attention(self.softmaxes.pop(number))
            return frozenset({PRODUCT})
        if name == "softmax" and operands[0].dim() >= 3 and PRODUCT in marks:
            self.calls += 1
            self.softmaxes[self.calls] = operands[0]
            return frozenset({self.calls})
        if name in ACTIVATE:
            self.activate()
        if name in NORMALISE and not self.inside["norm"]:
            self.counts["norm"] += 1
        if name in ADDS and all(isinstance(x, torch.Tensor) and x.dim() > 1 for x in args[:2]):
            assert isinstance(result, torch.Tensor)
            self.sums[result.data_ptr()] = result
        return marks if all(WEIGHT in m for m in each) else marks - {WEIGHT}

    def _marks(self, x: torch.Tensor) -> frozenset[object]:
        return frozenset({WEIGHT}) if isinstance(x, nn.Parameter) else self.marks.get(id(x), frozenset())

    def _mark(self, result: object, marks: frozenset[object]) -> None:
        for x in _tensors(result):
            self.marks[id(x)] = marks
            self.kept.append(x)

    def _attention(self, logits: torch.Tensor) -> None:
        self.counts["attention"] += 1
        self.logits.append(logits[logits > HIDDEN].float())

    def activate(self) -> None:
        """An activation function is called, by itself or in a module."""
        if not any(self.inside.values()):
            self.counts["mlp"] += 1

    def rotate(self, apply: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Stands for a function that rotates: one rope for each call of the module that calls it."""
        here = self.modules[-1] if self.modules else 0
        self.counts["rope"] += here not in self.rotating
        self.rotating.add(here)
        return apply(*args, **kwargs)

    def enter(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """A forward pre-hook of every module."""
        self.calls += 1
        self.modules.append(self.calls)
        kind = _kind(module)
        if kind == "activation":
            self.activate()
        elif kind == "experts":
            self.counts["experts"] += not self.inside["experts"]
        elif kind == "linear":
            self.counts["linear"] += 1
        elif kind == "norm" and args and isinstance(args[0], torch.Tensor):
            summed = self.sums.get(args[0].data_ptr())
            self.counts["norm of a sum"] += summed is not None and summed.shape == args[0].shape
        if kind in ("norm", "activation", "experts"):
            self.inside[kind] += 1

    def leave(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        """A forward hook of every module."""
        self.modules.pop()
        kind = _kind(module)
        if kind == "norm":
            if module not in self.normalising:
                self.normalising[module] = normalises(module, args, kwargs)
            self.counts["norm"] += self.normalising[module]
        if kind in ("norm", "activation", "experts"):
            self.inside[kind] -= 1


@contextmanager
def watching(model: nn.Module) -> Iterator[Census]:
    """Count what OPS_OF names, of the eager calls of a model inside the block."""
    seen = Census()
    with ExitStack() as undo:
        for place, name in _rotations(model):
            raw = next(vars(k)[name] for k in _bases(place) if name in vars(k))
            inner = raw.__func__ if isinstance(raw, staticmethod) else raw
            watched: object = functools.partial(seen.rotate, inner)
            if isinstance(raw, staticmethod):
                watched = staticmethod(watched)  # type: ignore[arg-type]
            elif isinstance(place, type):
                watched = _method(seen, inner)
            undo.enter_context(mock.patch.object(place, name, watched))
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(seen.enter, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(seen.leave, with_kwargs=True).remove)
        undo.enter_context(seen)
        yield seen


def expected_counts(model: nn.Module, **inputs: object) -> dict[str, int]:
    """How many of each of OPS_OF one call of the model has."""
    with torch.no_grad(), watching(model) as seen:
        model(**inputs)
    return {name: seen.counts[name] for name in OPS_OF}


def recognised_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The same from a report's `counts` (op name -> occurrences)."""
    return {name: sum(counts.get(op, 0) for op in ops) for name, ops in OPS_OF.items()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is called a norm: independent of what it computes."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def normalises(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether the output forgets the scale of each row (last dimension) of the first input, far above eps.

    A batch norm, a norm over channels and an affine map called a norm do not; nor counts a norm whose weights
    lie along another dimension (a group norm with a channel a group).
    """
    names = list(kwargs)
    x = args[0] if args else kwargs[names[0]]
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
        return False
    if any(p.dim() and p.shape[-1] != x.shape[-1] for p in module.parameters(recurse=False)):
        return False
    scale = 1 + 7 * torch.rand(*x.shape[:-1], 1, generator=torch.Generator().manual_seed(0))

    def run(value: torch.Tensor) -> torch.Tensor:
        if args:
            return module.forward(value, *args[1:], **kwargs)
        return module.forward(**{**kwargs, names[0]: value})

    one, other = run(64 * x), run(64 * x * scale.to(x.dtype))
    if not isinstance(one, torch.Tensor):
        return False
    return bool((one - other).abs().mean() <= 0.05 * one.abs().mean())  # bf16 rounds by 0.004


def _kind(module: nn.Module) -> str:
    """What a module counts as."""
    listed = isinstance(getattr(module, "experts", None), nn.ModuleList)
    if listed or any(_is_experts(m) and _is_product(m) for m in module.children()):
        return "experts"
    if _is_experts(module):
        return "" if _is_product(module) else "experts"
    if is_norm(module):
        return "norm"
    name = type(module).__name__
    if name in LINEARS:
        return "linear"
    named = any(a in name.lower() for a in ACTIVATIONS)
    return "activation" if named and not list(module.children()) else ""


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")


def _is_product(module: nn.Module) -> bool:
    """Whether a module has one matrix (or one for each expert) and no more: half an MLP at most."""
    return len(list(module.parameters())) == 1


def _rotations(model: nn.Module) -> Iterator[tuple[object, str]]:
    """Where functions that rotate are looked up: (file or class, name)."""
    classes = {k for m in model.modules() for k in type(m).__mro__ if issubclass(k, nn.Module)}
    files = {sys.modules[k.__module__] for k in classes if not k.__module__.startswith("torch.")}
    for place in (*files, *classes):
        for name in vars(place):
            if name.startswith(ROTATE) and callable(getattr(place, name)):
                yield place, name


def _bases(place: object) -> Sequence[object]:
    return place.__mro__ if isinstance(place, type) else (place,)


def _method(seen: Census, inner: Callable[..., object]) -> Callable[..., object]:
    def method(self: object, *args: object, **kwargs: object) -> object:
        return seen.rotate(inner, self, *args, **kwargs)

    return method


def _tensors(x: object) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)


def _sdpa_logits(
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a fused attention gives its softmax [batch, heads, queries, keys]; hidden logits are -inf."""
    q, k = (query if q is None else q), (key if k is None else k)
    assert q is not None and k is not None
    if q.dim() == 4:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > HIDDEN)
        logits = logits if attn_mask.dtype == torch.bool else logits + attn_mask  # a bias, ALiBi or T5's
    return logits.masked_fill(~visible, -torch.inf)
