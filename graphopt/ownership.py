"""Whose weights may go when their prepared forms exist: those of optimized models.

q.data = prepared[:rows]                where q stands verbatim in what was prepared: an alias
q.data = nan.expand(rows, columns)      where it does not (packed, sliced): a stand-in for bytes that are gone
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx, nn

from graphopt import graph as g
from graphopt import torch_private
from graphopt.errors import ReleasedError
from graphopt.options import Options

aten = torch.ops.aten

WAY_OUT = "reload the model, or optimize(model, release=False) before its first call"


# ------------------------------------------------------------------------------------------------ stand-ins


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of that shape and dtype in one element, NaN: reads are loud, most writes are errors."""
    with torch.inference_mode(False):
        return torch.full((1,) * len(shape), math.nan, dtype=dtype, device=device).expand(tuple(shape))


def is_stand_in(x: object) -> bool:
    """Whether a tensor stands in for released bytes. One that was filled in place (`zero_`) is a weight."""
    if not isinstance(x, torch.Tensor) or not can_stand_in(x) or x.device.type == "meta":
        return False
    if not _is_one_element(x):
        return False
    if isinstance(x, torch_private.FakeTensor):  # its values are not known: rather an error than NaN
        return True
    return bool(x.detach()[(0,) * x.dim()].isnan())


def _is_one_element(x: torch.Tensor) -> bool:
    """Whether all of a tensor lies in one element of memory. Dynamo can fold this."""
    return not any(step and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))


def can_stand_in(x: torch.Tensor) -> bool:
    """Whether a weight is worth a stand-in: biases and norms stay, and what has no NaN."""
    return x.dim() > 1 and x.numel() > 1 and x.is_floating_point()


# -------------------------------------------------------------------------------------------------- aliases

# One step from a prepared tensor back to a source in it: narrow(dim, start, size) or permute(*order).
Step: TypeAlias = "tuple[str, tuple[int, ...]]"
Way: TypeAlias = "tuple[Step, ...]"

_COPIES = frozenset(
    {aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.to.dtype}
)


def ways(gm: fx.GraphModule) -> dict[int, Way]:
    """Where each argument of a prepare graph stands verbatim in the result; only those that do, once.

    cat([w0, w1]) -> {0: ((narrow, (0, 0, rows)),), 1: ((narrow, (0, rows, rows)),)}
    """
    return {i: several[0] for i, several in _all_ways(gm).items() if len(several) == 1}


def repeated(gm: fx.GraphModule) -> frozenset[int]:
    """The arguments of a prepare graph that stand verbatim in the result several times: tied ones.

    An alias would be one of the places only, and a write to it would not reach the others.
    """
    return frozenset(i for i, several in _all_ways(gm).items() if len(several) > 1)


def _all_ways(gm: fx.GraphModule) -> dict[int, list[Way]]:
    numbers = {node: i for i, node in enumerate(g.placeholders(gm.graph))}
    found: dict[int, list[Way]] = {}
    todo: list[tuple[fx.Node, Way]] = [(n, ()) for n in g.output_node(gm.graph).all_input_nodes]
    while todo:
        node, way = todo.pop()
        if node in numbers:
            found.setdefault(numbers[node], []).append(way)
        todo += [(source, (*way, *steps)) for source, steps in _undone(node)]
    return found


def follow(way: Way, prepared: torch.Tensor) -> torch.Tensor:
    """The view of a prepared tensor that a way leads to."""
    for name, arguments in way:
        prepared = prepared.narrow(*arguments) if name == "narrow" else prepared.permute(arguments)
    return prepared


def keeps_layout(way: Way) -> bool:
    """Whether rows of a contiguous tensor are all that a way picks: its strides are those of a weight."""
    return all(name == "narrow" and arguments[0] == 0 for name, arguments in way)


def pinned(gm: fx.GraphModule) -> frozenset[int]:
    """The arguments of a prepare graph that have to stay readable, as another program may need more of them.

    That is those on which the model itself computes (a slice as long as its input, `weight * scale`): what it
    makes may differ from program to program. What our passes make (packs, a rank's parts) does not.
    """
    numbers = {node: i for i, node in enumerate(g.placeholders(gm.graph))}
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    todo = [n for n in calls if g.origin(n) is None and not _undone(n)]
    above = set(todo)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in above:
                above.add(source)
                todo.append(source)
    return frozenset(i for node, i in numbers.items() if node in above)


def _undone(node: fx.Node) -> list[tuple[fx.Node, Way]]:
    """What a call is made of and where it stands in the result; empty where it is not there verbatim."""
    if node.op != "call_function" or not node.all_input_nodes:
        return []
    source = node.all_input_nodes[0]
    if node.target in _COPIES:
        return [(source, ())] if g.dtype(source) == g.dtype(node) else []
    if node.target in (aten.t.default, aten.transpose.int, aten.permute.default):
        return [(source, (("permute", _order_back(node)),))]
    if node.target is not aten.cat.default:
        return []
    dim, start = _dim(g.arg(node, "dim"), node), 0
    parts: list[tuple[fx.Node, Way]] = []
    for part in node.args[0] if isinstance(node.args[0], (list, tuple)) else ():
        assert isinstance(part, fx.Node)
        if g.rank(part) != g.rank(node) or g.dtype(part) != g.dtype(node):
            return []
        size = int(g.shape(part)[dim])
        parts.append((part, (("narrow", (dim, start, size)),)))
        start += size
    return parts


def _order_back(node: fx.Node) -> tuple[int, ...]:
    """The permutation that undoes a transpose or permutation."""
    order = list(range(g.rank(node)))
    if node.target is aten.permute.default:
        given = g.arg(node, "dims")
        dims = [_dim(d, node) for d in (given if isinstance(given, (list, tuple)) else ())]
        return tuple(dims.index(d) for d in order)
    if len(order) > 1:
        named = node.target is aten.transpose.int
        one, two = (_dim(g.arg(node, n), node) for n in ("dim0", "dim1")) if named else (0, 1)
        order[one], order[two] = order[two], order[one]
    return tuple(order)


def _dim(dim: object, node: fx.Node) -> int:
    """A dimension of a node's value, counted from the front."""
    assert isinstance(dim, int)
    return dim % g.rank(node)


# ------------------------------------------------------------------------------------------------ the owners


class Marked:
    """A set of living tensors, by identity."""

    def __init__(self) -> None:
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}

    def add(self, x: torch.Tensor) -> None:
        """Mark a tensor until it dies."""
        if x not in self:
            key, tensors = id(x), self._tensors
            tensors[key] = weakref.ref(x, lambda _: tensors.pop(key, None))

    def __contains__(self, x: torch.Tensor) -> bool:
        known = self._tensors.get(id(x))
        return known is not None and known() is x


@dataclass(frozen=True)
class Owned:
    """How a model was optimized."""

    options: Options
    release: bool


class Owners:
    """The models whose weights are ours, and what is known of those weights.

    Attributes:
        read: weights that some program reads as they are: they stay where they are.
        leaving: weights that a program prepares in another layout: torch has to see past their strides.
        mine: weights that may be released. Not those that came later (assigned, `functional_call`): somebody
            else may hold them; and not those that share their memory.
        released: weights that have had a stand-in.
        generation: counts stand-ins made; what was readable before the last need not be now.
        keeping: how many are at work that need all weights as they are (`WeightStore.keeping`).
    """

    def __init__(self) -> None:
        self._models: weakref.WeakKeyDictionary[nn.Module, Owned] = weakref.WeakKeyDictionary()
        self.read, self.leaving, self.released, self.mine = Marked(), Marked(), Marked(), Marked()
        self.generation = self.keeping = 0

    def __bool__(self) -> bool:
        """Whether any model is owned: where none is, nothing has to be looked at."""
        return bool(self._models)

    def add(self, model: nn.Module, owned: Owned) -> None:
        """Own a model's parameters. What replaces one later is compiled for, but not released."""
        self._models[model] = owned
        self.take(alone(model) if owned.release else ())

    def take(self, weights: Iterable[torch.Tensor]) -> bool:
        """These may be released; whether any of them is new."""
        new = [x for x in weights if x not in self.mine]
        for x in new:
            self.mine.add(x)
        return bool(new)

    def of(self, model: nn.Module) -> Owned | None:
        """How a model is owned."""
        return self._models.get(model)

    def releasable(self) -> frozenset[int]:
        """The ids of the parameters that may be released: of one model only, and read by no program."""
        if self.keeping:
            return frozenset()
        models = [m for m, owned in list(self._models.items()) if owned.release]
        inner = {id(part) for m in models for part in m.modules() if part is not m}
        count = Counter(id(p) for m in models if id(m) not in inner for p in m.parameters() if p in self.mine)
        return frozenset(key for key, n in count.items() if n == 1 and key not in self.read._tensors)

    def owns(self, x: torch.Tensor) -> bool:
        """Whether a tensor is a parameter of a model that is owned, whatever may become of it."""
        return any(x is p for m in list(self._models) for p in m.parameters())

    def name_of(self, x: torch.Tensor) -> str:
        """The name of a parameter in the model that owns it."""
        named = (item for m in list(self._models) for item in m.named_parameters())
        return next((name for name, p in named if p is x), f"of shape {tuple(x.shape)}")

    def names(self) -> dict[int, str]:
        """The names of all parameters in the models that own them, by id."""
        return {id(p): name for m in list(self._models) for name, p in m.named_parameters()}

    def admit(self, weights: Iterable[object]) -> None:
        """A program is about to read these as they are: from now on they stay.

        Raises:
            ReleasedError: one of them was released.
        """
        for x in weights:
            if not isinstance(x, nn.Parameter):
                continue
            if is_stand_in(x):
                raise ReleasedError(
                    f"weight {self.name_of(x)} was released when its prepared form was made, and a program "
                    f"needs it as it was; {WAY_OUT}"
                )
            self.read.add(x)

    def give_stand_in(self, x: torch.Tensor, shape: Sequence[int] | None = None) -> None:
        """Let go of a weight's memory; it keeps its shape (or gets the one given), dtype and device."""
        x.data = stand_in(x.shape if shape is None else shape, x.dtype, x.device)
        self.released.add(x)
        self.generation += 1

    def skips_guard(self, value: object) -> bool:
        """Whether torch's guard on a tensor would see its release as a change."""
        return isinstance(value, nn.Parameter) and value in self.leaving and value in self.mine


def alone(model: nn.Module) -> list[torch.Tensor]:
    """The parameters of a model whose memory is theirs: all of it, and no other weight's or buffer's."""
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
    places = Counter(x.untyped_storage().data_ptr() for x in tensors)
    found: list[torch.Tensor] = []
    for p in model.parameters():
        storage = p.untyped_storage()
        if storage.data_ptr() == 0 or (places[storage.data_ptr()] == 1 and storage.nbytes() <= p.nbytes):
            found.append(p)  # 0: on meta, or empty
    return found


# -------------------------------------------------------------------------------------------- in the modules


class Keeper:
    """Stands among a module's hooks and knows its weights: what would copy stand-ins is an error.

    That is `state_dict` (so `save_pretrained`), `copy.deepcopy` and pickling, which copy hooks too.
    """

    def __init__(self, module: nn.Module | None = None, path: str = "") -> None:
        self.module = None if module is None else weakref.ref(module)
        self.path = path

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Before `state_dict`."""
        self.refuse("read as a state dict")

    def refuse(self, what: str, why: str = "") -> None:
        """Raise where the module has stand-ins."""
        module = None if self.module is None else self.module()
        for name, p in () if module is None else module.named_parameters(self.path, recurse=False):
            if is_stand_in(p):
                raise ReleasedError(
                    f"weight {name} was released when its prepared form was made: the model cannot be "
                    f"{what}; graphopt.save(model, directory) keeps what there is, or {WAY_OUT}{why}"
                )

    def __deepcopy__(self, memo: dict[int, object]) -> Keeper:
        self.refuse("copied")
        return Keeper()  # a copy is nobody's

    def __reduce__(self) -> tuple[type[Keeper], tuple[()]]:
        self.refuse("pickled")
        return Keeper, ()


def make_room(module: nn.Module, state: Mapping[str, object], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: a stand-in that is going to be written becomes a tensor."""
    for name, p in module.named_parameters(recurse=False):
        new = state.get(prefix + name)
        if isinstance(new, torch.Tensor) and new.shape == p.shape and is_stand_in(p):
            p.data = torch.empty(p.shape, dtype=p.dtype, device=p.device)


def refuse_eager(module: nn.Module, args: object) -> None:
    """Before a module's forward pass: with stand-ins it has to be compiled by us. Dynamo folds this away."""
    if torch.compiler.is_compiling():
        exporting = torch.compiler.is_exporting()
        if exporting or not _is_compiled_by_us():
            for p in module._parameters.values():
                if p is not None and p.dim() > 1 and p.numel() > 1 and _is_one_element(p):
                    if exporting:
                        raise ReleasedError(
                            f"a weight {tuple(p.shape)} was released when its prepared form was made: the "
                            "model cannot be exported; export it before optimize, or reload it"
                        )
                    torch_private.graph_break()  # another compiler: the model runs for itself, or is refused
        return
    for hook in module._state_dict_pre_hooks.values():
        if isinstance(hook, Keeper):
            hook.refuse("run without being compiled", torch_private.RECOMPILE_LIMIT)


@torch_private.constant_while_tracing
def _is_compiled_by_us() -> bool:
    """While Dynamo traces: whether the graph is for graphopt. Compiled code is used for its backend only."""
    return torch_private.compiler_name() in ("graphopt", None)


def keep(model: nn.Module) -> None:
    """Hook these into every module of a model that has parameters, once."""
    for path, module in model.named_modules():
        hooks = module._state_dict_pre_hooks
        kept = {key: hook for key, hook in hooks.items() if isinstance(hook, Keeper)}
        if not module._parameters or any(k.module is not None for k in kept.values()):
            continue
        module.register_state_dict_pre_hook(Keeper(module, path))
        if not kept:  # a copy has brought them along
            module.register_load_state_dict_pre_hook(make_room)
            module.register_forward_pre_hook(refuse_eager)
