"""Turn in-place calls into values: mutation becomes pure ops, and what an input gained is written back at the
end.

    cache.index_copy_(2, pos, k); use(cache)   ->   c1 = index_copy(cache, 2, pos, k); use(c1); copy_(cache,
    c1)

Aliasing is read off the fake tensors of the trace: two values alias when they share a storage. So no-op
casts, `contiguous` and `reshape` are judged as they really behaved, and views are regenerated from the newest
value of their base (functionalization as in PyTorch's own,
https://dev-discuss.pytorch.org/t/functionalization-in-pytorch/965, kept at the pre-dispatch level where
`linear` and attention are still whole).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.aliasing import root, storage, writes, written_arguments
from graphopt.errors import CaptureRefused
from graphopt.passes.views import ABSOLUTE, parent, scatter
from graphopt.torch_private import OpOverload

aten = torch.ops.aten

# In-place calls that change a tensor's own sizes or storage: a value has no such thing.
METADATA_WRITES = frozenset(
    {
        "resize_",
        "resize_as_",
        "set_",
        "squeeze_",
        "unsqueeze_",
        "transpose_",
        "t_",
        "as_strided_",
        "swapaxes_",
        "swapdims_",
    }
)


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """The same program without in-place calls, except `copy_(input, value)` right before the output.

    A writing operator without a pure form runs on a copy that nobody else sees: a barrier, precise by alias.

    Raises:
        CaptureRefused: a write that has no meaning as a value (sizes or storage changed in place, a write
        through
            `expand`, into two inputs that share memory, or into a constant).
    """
    if not any(writes(n) for n in gm.graph.nodes):
        return gm
    return _Functionalizer(gm).run()


@dataclass(eq=False)
class _Memory:
    """One storage of the original program."""

    base: fx.Node  # the old node that brought it in
    newest: fx.Node  # the new node with the base's newest value
    version: int = 0  # how often it was written
    shared: bool = False  # two inputs have it


@dataclass
class _Functionalizer:
    source: fx.GraphModule
    out: fx.Graph = field(default_factory=fx.Graph)
    entry: dict[fx.Node, fx.Node] = field(default_factory=dict)  # old placeholder -> new placeholder
    env: dict[fx.Node, tuple[fx.Node, int]] = field(
        default_factory=dict
    )  # old node -> its value at a version
    memories: dict[int, _Memory] = field(default_factory=dict)
    fakes: dict[object, torch.Tensor] = field(
        default_factory=dict
    )  # a pure op's result for kinds of arguments

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            if node.op == "output":
                self.finish(node)
            elif writes(node):
                self.write(node)
            else:
                self.keep(node)
        result = torch_private.lazy_module(self.source, self.out)
        result.meta.update(self.source.meta)
        return result

    def memory(self, node: fx.Node) -> _Memory | None:
        """The memory behind an old node, if it is a tensor (or pieces of one) that was brought in."""
        key = storage(g.val(node))
        return None if key is None else self.memories.get(key)

    # -------------------------------------------------------------------------------------------- reading

    def keep(self, node: fx.Node) -> None:
        """Copy a call that writes nothing, on the newest values of what it reads."""
        if node.target is operator.getitem and self.memory(node) and writes(node.args[0]):  # type: ignore[arg-type]  # a node
            return  # what an in-place call wrote: `regenerated` finds it
        new = self.out.node_copy(node, self.read)
        if node.op == "placeholder":
            self.entry[node] = new
            if memory := self.memory(node):
                memory.shared = True  # harmless unless it is written
        self.bring(node, new)

    def bring(self, node: fx.Node, new: fx.Node) -> None:
        """Remember the value of an old node, and that it brought in its memory if no earlier node did."""
        memory, key = self.memory(node), storage(g.val(node))
        if memory is None and key is not None:
            memory = self.memories[key] = _Memory(node, new)
        self.env[node] = (new, memory.version if memory else 0)

    def read(self, node: fx.Node) -> fx.Node:
        """The newest value of an old node: regenerated from its parent where its memory was written since."""
        memory = self.memory(node)
        known, version = self.env.get(node, (None, -1))
        if known is not None and (memory is None or version == memory.version):
            return known
        assert memory is not None, f"{node} is read before it is made"
        value = memory.newest if node is memory.base else self.regenerated(node)
        self.env[node] = (value, memory.version)
        return value

    def regenerated(self, node: fx.Node) -> fx.Node:
        """A view, or the result of an in-place call, on the newest value of what it shares memory with."""
        if origin := _written_origin(node):
            return self.read(origin)
        if node.target in ABSOLUTE:
            raise CaptureRefused(f"{node.target} of memory that is written in place ({_where(node)})")
        return self.out.node_copy(node, self.read)

    # -------------------------------------------------------------------------------------------- writing

    def write(self, node: fx.Node) -> None:
        """Compute what a call writes, by a pure op where there is one: the newest value of its memory."""
        targets = written_arguments(node)
        name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]  # an OpOverload
        if node.target is aten.set_.source_Tensor and node.args[0] is node.args[1]:
            self.bring(node, self.read(targets[0]))  # module.to(dtype) where the weights have it already
            return
        if name in METADATA_WRITES:
            raise CaptureRefused(f"{name} changes a tensor's sizes or storage in place ({_where(node)})")
        for target in targets:
            if storage(g.val(target)) is None or isinstance(g.val(target), (list, tuple)):
                raise CaptureRefused(
                    f"{node.target} writes {target.name}, which is no single tensor ({_where(node)})"
                )
        functional = _functional(node.target)
        if node.target is aten.copy_.default:
            self.assign(targets[0], self.copied(node, targets[0]), node)
        elif functional is not None and len(targets) == 1:
            self.assign(targets[0], self.pure(functional, node, targets[0]), node)
        else:
            self.on_copies(node, targets)
        # Its result, where that is read at all, is what it wrote: `regenerated` finds it.

    def pure(self, functional: OpOverload, node: fx.Node, target: fx.Node) -> fx.Node:
        """add_(x, y) -> add(x, y), cast back to x's dtype where the pure op promotes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.read)
        key = (functional, *(_kind(a) for a in g.flat_arguments(node)))
        if key not in self.fakes:
            self.fakes[key] = self.fake(functional, node)
        if self.fakes[key].dtype == g.dtype(
            target
        ):  # its abstract value is the target's: in eager, one memory
            return self.emit(functional, args, g.val(target), node, kwargs)
        result = self.fake(functional, node)
        value = self.emit(functional, args, result, node, kwargs)
        return self.emit(aten.to.dtype, (value, g.dtype(target)), g.val(target), node)

    def on_copies(self, node: fx.Node, targets: tuple[fx.Node, ...]) -> None:
        """Run a writing operator on copies that nobody else sees: op_(x, y) -> private = clone(x);
        op_(private, y).
        """
        if len({storage(g.val(t)) for t in targets}) != len(targets):
            raise CaptureRefused(f"{node.target} writes two arguments that share memory ({_where(node)})")
        private: dict[fx.Node, fx.Node] = {}
        for target in targets:
            private[target] = self.copy(self.read(target), target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: private.get(n) or self.read(n))
        new = self.emit(node.target, args, g.val(node), node, kwargs)
        for target, copy in private.items():
            self.assign(target, copy, node)
        if self.memory(node) is None:  # it returns no tensor, several, or new memory; else what it wrote
            self.bring(node, new)

    def fake(self, functional: OpOverload, node: fx.Node) -> torch.Tensor:
        """What the pure op gives: an in-place op keeps its argument's dtype, the pure one promotes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), g.val)  # type: ignore[arg-type]  # values, not nodes
        mode = torch_private.fake_mode_of([g.val(n) for n in node.all_input_nodes])
        assert mode is not None
        with torch_private.no_dispatch_of(mode):
            return functional(*args, **kwargs)

    def copied(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """copy_(x, y) -> y, cast and broadcast to x."""
        wanted, source = g.val(target), node.args[1]
        assert isinstance(wanted, torch.Tensor) and isinstance(source, fx.Node)
        have, value = g.tensor(source), self.read(source)
        assert have is not None
        if have.dtype != wanted.dtype or have.device != wanted.device:
            cast = have.new_empty(have.shape, dtype=wanted.dtype, device=wanted.device)
            value = self.emit(aten.to.device, (value, wanted.device, wanted.dtype), cast, node)
        if not g.same_shape(tuple(have.shape), tuple(wanted.shape)):
            value = self.emit(aten.expand_as.default, (value, self.read(target)), wanted, node)
        return value

    def assign(self, node: fx.Node, value: fx.Node, writer: fx.Node) -> None:
        """Give an old node's memory a new value, through all views up to the base."""
        memory = self.memory(node)
        assert memory is not None
        if memory.shared:
            raise CaptureRefused(
                f"two inputs share the memory that {writer.target} writes ({_where(writer)})"
            )
        if memory.base.op == "get_attr":
            raise CaptureRefused(
                f"{writer.target} writes a constant; make it an argument or a buffer ({_where(writer)})"
            )
        if node is memory.base:
            memory.newest = value
            memory.version += 1
        elif origin := _written_origin(node):
            self.assign(origin, value, writer)
        else:
            whole = parent(node)
            while isinstance(g.val(whole), (list, tuple)):  # a piece of a split is a view of what was split
                whole = parent(whole)
            self.assign(whole, scatter(self.emit, node, self.read(whole), value, self.read), writer)
        self.env[node] = (value, memory.version)

    def emit(
        self,
        target: object,
        args: object,
        value: object,
        like: fx.Node,
        kwargs: Mapping[str, object] | None = None,
    ) -> fx.Node:
        """A call of the new graph."""
        new = self.out.create_node("call_function", target, args, dict(kwargs or {}))  # type: ignore[arg-type]  # nodes and values
        g.copy_provenance(new, like)
        g.set_val(new, value)
        return new

    # ------------------------------------------------------------------------------------------ finishing

    def finish(self, output: fx.Node) -> None:
        """Write-backs, then the outputs.

        An output that aliases something written is regenerated as a view of it: of the written-back input, or
        of the newest value of an intermediate, so that outputs share memory as they did.
        """
        changed = [m for m in self.memories.values() if m.version]
        written = [m for m in changed if m.base.op == "placeholder" and m.newest is not self.entry[m.base]]
        for memory in changed:
            memory.version += 1  # every view of it is made again
        results = [n for n in output.all_input_nodes if self.memory(n) not in written]
        self.keep_apart([m for n in results if (m := self.memory(n)) is not None])
        entries = {self.entry[m.base] for m in written}
        # What is written elsewhere or returned must not change when the inputs are written.
        fixed = {n: self.protected(self.read(n), entries) for n in results}
        values = [self.protected(m.newest, entries) for m in written]
        for memory, value in zip(written, values, strict=True):
            args = (self.entry[memory.base], value, False)
            memory.newest = self.emit(aten.copy_.default, args, g.val(memory.base), memory.base)
            memory.version += 1
        new = self.out.create_node(
            "output", "output", fx.node.map_arg(output.args, lambda n: fixed.get(n) or self.read(n))
        )
        new.meta.update(output.meta)

    def keep_apart(self, returned: list[_Memory]) -> None:
        """y = empty(…); y.copy_(x); return y: what was memory of its own in the original stays so."""
        owners = {self.entry[m.base]: m for m in self.memories.values() if m.base.op == "placeholder"}
        for memory in self.memories.values():
            if (
                not memory.version and root(memory.newest) is memory.newest
            ):  # a reshape that copied is no view
                owners.setdefault(memory.newest, memory)
        for memory in returned:
            if memory.version and owners.setdefault(root(memory.newest), memory) is not memory:
                memory.newest = self.copy(memory.newest, memory.base)

    def copy(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """A clone that stays one."""
        new = self.emit(aten.clone.default, (value,), g.val(like), like)
        new.meta["keep"] = True
        return new

    def protected(self, value: fx.Node, entries: set[fx.Node]) -> fx.Node:
        """A copy of a value that may be (a view of) an input about to be written; any other as it is."""
        return self.copy(value, value) if root(value) in entries else value


def _kind(argument: object) -> object:
    """What part an argument has in type promotion: dtype and 0-dimensional or not, or its Python type."""
    if isinstance(argument, fx.Node) and g.is_tensor(argument):
        return g.dtype(argument), g.rank(argument) == 0
    return type(argument)


def _where(node: fx.Node) -> str:
    return g.source(node) or node.name


def _written_origin(node: fx.Node) -> fx.Node | None:
    """The argument that an in-place call returns, for the call and for `getitem` of it; None for any other
    node.
    """
    maker = node.args[0] if node.target is operator.getitem else node
    if not isinstance(maker, fx.Node) or not writes(maker):
        return None
    key = storage(g.val(node))
    return next((n for n in written_arguments(maker) if storage(g.val(n)) == key), None)


def _functional(target: Callable[..., object] | str) -> OpOverload | None:
    """`aten.add_.Tensor` -> `aten.add.Tensor`: the same overload with the same arguments, or None."""
    assert isinstance(target, OpOverload)
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or g.is_random(target):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    found = getattr(packet, target._overloadname)
    return found if g.argument_names(found) == g.argument_names(target) and not g.is_mutable(found) else None
