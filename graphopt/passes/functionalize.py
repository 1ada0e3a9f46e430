"""Turn in-place calls into values: mutation becomes pure ops, and what an input gained is written back at the end.

    cache.index_copy_(2, pos, k); use(cache)   ->   c1 = index_copy(cache, 2, pos, k); use(c1); copy_(cache, c1)

Aliasing is read off the fake tensors of the trace: two values alias when they share a storage. So no-op casts,
`contiguous` and `reshape` are judged as they really behaved, and views are regenerated from the newest value of their base
(functionalization as in PyTorch's own, https://dev-discuss.pytorch.org/t/functionalization-in-pytorch/965, kept at the
pre-dispatch level where `linear` and attention are still whole).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.errors import CaptureRefused

aten = torch.ops.aten

# In-place calls that change a tensor's own sizes or storage: a value has no such thing.
METADATA_WRITES = frozenset(
    {"resize_", "set_", "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "swapaxes_", "swapdims_"}
)
# Written by their schema, yet they only return their argument.
ALIAS_ONLY = frozenset({aten.detach_.default})


def mutates(graph: fx.Graph) -> bool:
    """Whether any call writes to an argument."""
    return any(writes(n) for n in graph.nodes)


def writes(node: fx.Node) -> bool:
    """Whether a node is a call that writes to an argument."""
    return node.op == "call_function" and g.is_mutable(node.target) and node.target not in ALIAS_ONLY


def storage(value: object) -> int | None:
    """The identity of the storage behind a fake tensor, or behind all pieces of a split; equal storages alias."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage()._cdata
    if isinstance(value, (list, tuple)) and value:
        keys = {storage(v) for v in value}
        return keys.pop() if len(keys) == 1 else None
    return None


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """The same program without in-place calls, except `copy_(input, value)` right before the output.

    Raises:
        CaptureRefused: a write that has no meaning as a value (sizes or storage changed in place, a write through
            `expand`, or into two inputs that share memory).
    """
    if not mutates(gm.graph):
        return gm
    return _Functionalizer(gm).run()


@dataclass
class _Functionalizer:
    source: fx.GraphModule
    out: fx.Graph = field(default_factory=fx.Graph)
    entry: dict[fx.Node, fx.Node] = field(default_factory=dict)  # old placeholder -> new placeholder
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)  # old node -> the value it had when last read
    seen: dict[fx.Node, int] = field(default_factory=dict)  # old node -> version of its storage at that time
    version: dict[int, int] = field(default_factory=dict)
    base: dict[int, fx.Node] = field(default_factory=dict)  # storage -> the old node that brought it in
    newest: dict[int, fx.Node] = field(default_factory=dict)  # storage -> new node with the base's newest value

    def run(self) -> fx.GraphModule:
        inputs = g.placeholders(self.source.graph)
        for node in self.source.graph.nodes:
            if node.op == "output":
                self.finish(node, inputs)
            elif writes(node):
                self.write(node)
            else:
                self.keep(node)
        result = fx.GraphModule(self.source, self.out)
        result.meta.update(self.source.meta)
        return result

    # -------------------------------------------------------------------------------------------- reading

    def keep(self, node: fx.Node) -> None:
        """Copy a call that writes nothing, on the newest values of what it reads."""
        new = self.out.node_copy(node, self.read)
        self.env[node] = new
        if node.op == "placeholder":
            self.entry[node] = new
        key = storage(g.val(node))
        if key is None:
            return
        self.seen[node] = self.version.setdefault(key, 0)
        if key not in self.base:
            self.base[key] = node
            self.newest[key] = new
        elif node.op == "placeholder":
            self.base[key] = node  # two inputs share memory: remembered by `shared`, refused only if written
            self.version[key] = -1

    def read(self, node: fx.Node) -> fx.Node:
        """The newest value of an old node: regenerated from its parent where its storage was written since."""
        key = storage(g.val(node))
        if key is None or self.seen.get(node) == self.version[key]:
            return self.env[node]
        if node is self.base[key]:
            value = self.newest[key]
        elif writes(node):
            value = self.read(_written_argument(node))  # an in-place call returns what it wrote
        else:
            self.read(_parent(node, key))
            value = self.out.node_copy(node, self.read)
        self.env[node], self.seen[node] = value, self.version[key]
        return value

    # -------------------------------------------------------------------------------------------- writing

    def write(self, node: fx.Node) -> None:
        """Compute the written value with a pure op and make it the newest of its storage."""
        target = _written_argument(node)
        name = node.target._schema.name.split("::")[1]
        if name in METADATA_WRITES:
            raise CaptureRefused(f"{name} changes a tensor's sizes or storage in place ({g.source(node) or node.name})")
        value = self.pure(node, target)
        self.assign(target, value, node)
        self.env[node] = self.env[target]
        key = storage(g.val(node))
        if key is not None:
            self.seen[node] = self.version[key]
            self.base.setdefault(key, target)

    def pure(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The call as a pure op; an unknown writing op runs on a copy that nobody else sees (a barrier by alias)."""
        args = fx.node.map_arg(node.args, self.read)
        kwargs = fx.node.map_arg(node.kwargs, self.read)
        old = self.read(target)
        if node.target is aten.copy_.default:
            return self.shaped_like(args[1], node.args[1], target)
        functional = _functional(node.target)
        if functional is None:
            private = self.emit(aten.clone.default, (old,), g.val(target), node)
            private.meta["keep"] = True
            swap = {old: private}
            new = self.out.create_node(
                "call_function",
                node.target,
                fx.node.map_arg(args, lambda n: swap.get(n, n)),
                fx.node.map_arg(kwargs, lambda n: swap.get(n, n)),
            )
            new.meta.update(node.meta)
            return private
        result = self.fake(functional, node)
        value = self.emit(functional, args, result, node, kwargs)
        wanted = g.dtype(target)
        if result.dtype == wanted:
            return value
        return self.emit(aten.to.dtype, (value, wanted), result.new_empty(result.shape, dtype=wanted), node)

    def fake(self, functional: torch._ops.OpOverload, node: fx.Node) -> torch.Tensor:
        """What the pure op gives: an in-place op keeps its argument's dtype, the pure one promotes."""
        fakes_args, fake_kwargs = fx.node.map_arg((node.args, node.kwargs), g.val)
        mode = torch_private.fake_mode_of([g.val(n) for n in node.all_input_nodes])
        assert mode is not None
        with torch_private.no_dispatch_of(mode):
            return functional(*fakes_args, **fake_kwargs)

    def shaped_like(self, value: fx.Node, old: fx.Node | float, target: fx.Node) -> fx.Node:
        """`copy_`'s value: cast and broadcast to what is written."""
        wanted = g.val(target)
        assert isinstance(wanted, torch.Tensor)
        if not isinstance(old, fx.Node):
            return self.emit(aten.full_like.default, (self.read(target), old), wanted, target)
        have = g.tensor(old)
        assert have is not None
        if have.dtype != wanted.dtype or have.device != wanted.device:
            cast = have.new_empty(have.shape, dtype=wanted.dtype, device=wanted.device)
            value = self.emit(aten.to.device, (value, wanted.device, wanted.dtype), cast, target)
        if not g.same_shape(tuple(have.shape), tuple(wanted.shape)):
            value = self.emit(aten.expand_as.default, (value, self.read(target)), wanted, target)
        return value

    def assign(self, node: fx.Node, value: fx.Node, writer: fx.Node) -> None:
        """Give an old node's memory a new value, through all views up to the base."""
        key = storage(g.val(node))
        assert key is not None
        if self.version[key] < 0:
            raise CaptureRefused(f"two inputs share the memory that {writer.target} writes ({g.source(writer)})")
        if node is self.base[key]:
            self.newest[key] = value
            self.version[key] += 1
        else:
            parent = _parent(node, key)
            parent_value = self.read(parent)
            self.assign(parent, self.scatter(node, parent, parent_value, value), writer)
        if not isinstance(g.val(node), (list, tuple)):  # the pieces of a split are made again when they are read
            self.env[node], self.seen[node] = value, self.version[key]

    def scatter(self, view: fx.Node, parent: fx.Node, parent_value: fx.Node, value: fx.Node) -> fx.Node:
        """view(parent) = value  ->  the parent's new value."""
        whole = g.val(parent)
        assert isinstance(whole, torch.Tensor)
        part = g.tensor(view)
        target = view.target
        args = fx.node.map_arg(view.args, self.read)
        if target is aten.slice.Tensor:
            return self.emit(aten.slice_scatter.default, (parent_value, value, *args[1:]), whole, view)
        if target is aten.select.int:
            return self.emit(aten.select_scatter.default, (parent_value, value, *args[1:]), whole, view)
        if target is aten.diagonal.default:
            return self.emit(aten.diagonal_scatter.default, (parent_value, value, *args[1:]), whole, view)
        if target is aten.transpose.int:
            return self.emit(aten.transpose.int, (value, *args[1:]), whole, view)
        if target is aten.t.default:
            return self.emit(aten.t.default, (value,), whole, view)
        if target is aten.permute.default:
            dims = [d % len(args[1]) for d in args[1]]
            return self.emit(aten.permute.default, (value, [dims.index(i) for i in range(len(dims))]), whole, view)
        if target is operator.getitem:
            return self.scatter_piece(view, parent, value)
        if isinstance(g.val(view), (list, tuple)):
            return value  # the pieces have already been put into the whole
        if part is not None and g.same_size(part.numel(), whole.numel()):  # view, alias, a cast or copy that was none
            return self.emit(aten.reshape.default, (value, list(self.sizes(parent_value, whole))), whole, view)
        raise CaptureRefused(f"a write through {target} has no meaning as a value ({g.source(view) or view.name})")

    def scatter_piece(self, piece: fx.Node, split: fx.Node, value: fx.Node) -> fx.Node:
        """A piece of split, chunk or unbind is written: the new value of what was split."""
        key, index = storage(g.val(piece)), piece.args[1]
        assert key is not None and isinstance(index, int)
        source = _parent(split, key)
        whole, pieces = g.val(source), g.val(split)
        assert isinstance(whole, torch.Tensor) and isinstance(pieces, (list, tuple))
        dim = g.arg(split, "dim")
        assert isinstance(dim, int)
        if split.target is aten.unbind.int:
            return self.emit(aten.select_scatter.default, (self.read(source), value, dim, index), whole, piece)
        start = sum(p.shape[dim] for p in pieces[:index])
        end = start + pieces[index].shape[dim]
        if not isinstance(end, int):
            raise CaptureRefused(f"a write to a piece of symbolic size of {split.target} ({g.source(piece) or piece.name})")
        args = (self.read(source), value, dim, start, end)
        return self.emit(aten.slice_scatter.default, args, whole, piece)

    def sizes(self, value: fx.Node, like: torch.Tensor) -> list[object]:
        """The sizes of a value: literals where static, `sym_size` nodes where not."""
        out: list[object] = []
        for i, size in enumerate(like.shape):
            if isinstance(size, int):
                out.append(size)
            else:
                out.append(self.emit(aten.sym_size.int, (value, i), size, value))
        return out

    def emit(
        self, target: object, args: tuple[object, ...], value: object, like: fx.Node, kwargs: dict[str, object] | None = None
    ) -> fx.Node:
        new = self.out.create_node("call_function", target, args, kwargs or {})  # type: ignore[arg-type]  # OpOverloads are callable
        g.copy_provenance(new, like)
        g.set_val(new, value)
        return new

    # ------------------------------------------------------------------------------------------ finishing

    def finish(self, output: fx.Node, inputs: list[fx.Node]) -> None:
        """Write-backs, then the outputs: what aliases a written input is regenerated on top of the written input."""
        written = [n for n in inputs if (k := storage(g.val(n))) is not None and self.newest[k] is not self.entry[n]]
        values = {n: self.newest[storage(g.val(n))] for n in written}  # type: ignore[index]  # a tensor has a storage
        escaping = {n for n in output.all_input_nodes if storage(g.val(n)) not in {storage(g.val(i)) for i in written}}
        # What escapes, or is written elsewhere, must not change when the inputs are written.
        fixed = {n: self.read(n) for n in escaping}
        protected = {v: self.protect(v, written) for v in {*values.values(), *fixed.values()}}
        for node in written:
            key = storage(g.val(node))
            assert key is not None
            copy = self.emit(aten.copy_.default, (self.entry[node], protected[values[node]]), g.val(node), node)
            self.newest[key] = copy
            self.version[key] += 1
        for node, value in fixed.items():
            self.env[node] = protected[value]
        new = self.out.create_node("output", "output", fx.node.map_arg(output.args, self.read))
        new.meta.update(output.meta)

    def protect(self, value: fx.Node, written: list[fx.Node]) -> fx.Node:
        """A copy of a value that is (a view of) a placeholder about to be written; any other value as it is."""
        root = value
        while root.op == "call_function" and root.all_input_nodes and storage(g.val(root)) == storage(
            g.val(root.all_input_nodes[0])
        ):
            root = root.all_input_nodes[0]
        if root.op == "placeholder" and any(root is self.entry[n] for n in written):
            copy = self.emit(aten.clone.default, (value,), g.val(value), value)
            copy.meta["keep"] = True
            return copy
        return value


def _parent(node: fx.Node, key: int) -> fx.Node:
    """The argument that a node is a view of."""
    for argument in node.all_input_nodes:
        value = g.val(argument)
        if storage(value) == key or (isinstance(value, (list, tuple)) and key in {storage(v) for v in value}):
            return argument
    raise CaptureRefused(f"{node.target} aliases a tensor that it does not read ({g.source(node) or node.name})")


def _written_argument(node: fx.Node) -> fx.Node:
    """The one argument that an in-place call writes."""
    written = [
        g.arg(node, a.name) for a in g.schema_arguments(node.target) if a.alias_info is not None and a.alias_info.is_write
    ]
    nodes = [n for n in written if isinstance(n, fx.Node)]
    if len(nodes) != 1 or len(written) != 1:
        raise CaptureRefused(f"{node.target} writes {len(written)} arguments; only one is supported ({g.source(node)})")
    return nodes[0]


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.add_.Tensor` -> `aten.add.Tensor`: the same overload with the same arguments, or None."""
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or g.is_random(target):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    found = getattr(packet, target._overloadname)
    return found if g.argument_names(found) == g.argument_names(target) else None
