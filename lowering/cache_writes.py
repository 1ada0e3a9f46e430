"""Make the writes of a layer's caches one call, with the rotation before them, and the lengths' advance one.

    q', k' = rope(q, k, cos, sin); index_copy_(keys, -2, p, k'); index_copy_(values, -2, p, v)
    ->   q' = rope_write(q, k, v, cos, sin, ..., keys, values, p)

Called on a graph whose write-backs are in place. What does not fit stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt import aliasing, ops
from graphopt import graph as g
from graphopt.lowering.alias import family, readers
from graphopt.lowering.build import insert_call

aten = torch.ops.aten
ATTENTIONS = (ops.attention.overload, ops.attention_lse.overload)
NORM_ARGUMENTS = ("eps", "weight_offset", "cast_before_scale")
CACHE_RANK, POSITIONS = 4, 2  # [batch, heads, length, head_dim]; which dimension is the length


# -------------------------------------------------------------------------------------------------- lengths


def advance_lengths(graph: fx.Graph) -> int:
    """add_(t, k) of each layer's length t -> one _foreach_add_([t, ...], k) at the end; returns how many.

    Also where the new length is made first and copied into t at the end. A length whose new value something
    reads stays as it is. Before `group_cache_writes`: a length that advances late can be read until then.
    """
    order = _order(graph)
    steps: dict[tuple[object, ...], list[tuple[fx.Node, fx.Node]]] = {}
    for node in list(graph.nodes):
        length = node.args[0] if g.is_call(node, aten.add_.Tensor, aten.copy_.default) else None
        if not isinstance(length, fx.Node) or not _is_length(length):
            continue
        step = _step(length, node)
        if step is not None and _nothing_reads_after(length, node, order):
            steps.setdefault((step, g.dtype(length), g.device(length)), []).append((length, node))
    with graph.inserting_before(g.output_node(graph)):
        for (step, *_), written in steps.items():
            new = graph.call_function(
                aten._foreach_add_.Scalar,
                ([length for length, _ in written], step),  # type: ignore[arg-type]  # nodes and a number
            )
            g.copy_provenance(new, written[0][1])
            new.meta["module_path"] = ""  # it is of all layers
            g.set_val(new, None)
    for _, node in (pair for written in steps.values() for pair in written):
        graph.erase_node(node)
    g.eliminate_dead_code(graph)
    return sum(map(len, steps.values()))


def _is_length(node: fx.Node) -> bool:
    """Whether a node is an integer without dimensions that comes from outside."""
    if node.op != "placeholder" or not g.is_tensor(node) or g.rank(node) or g.is_weight(node):
        return False
    return g.dtype(node) in (torch.int64, torch.int32)


def _step(length: fx.Node, node: fx.Node) -> object:
    """What a call adds to the length in place: a number or the node of a size; None for any other call."""
    total = node
    if g.is_call(node, aten.copy_.default):
        if not g.is_call(node.args[1], aten.add.Tensor):
            return None
        total = node.args[1]  # type: ignore[assignment]  # a node, as just seen
    base, step = total.args[:2]
    if base is not length or g.arg(total, "alpha") != 1 or isinstance(g.number(step), (bool, float)):
        return None
    return None if g.is_tensor(step) else step


def _nothing_reads_after(length: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the new length is for the next call alone: no value made from it, no later reader."""
    if node.users:
        return False
    seen = {user for view in family(length, node) for user in view.users} - {node}
    return all(order[user] < order[node] and user.op != "output" for user in seen)


# --------------------------------------------------------------------------------------------------- writes


@dataclass(frozen=True)
class Write:
    """index_copy_(cache, -2, position, new)"""

    node: fx.Node

    @property
    def cache(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]  # a tensor

    @property
    def position(self) -> fx.Node:
        """Which rows: as the program has them, before they were made the int64 that index_copy_ takes."""
        rows = self.node.args[2]
        if g.is_call(rows, aten.to.dtype) and g.dtype(rows.args[0]) == torch.int32:  # type: ignore[union-attr, arg-type]
            rows = rows.args[0]  # type: ignore[union-attr]  # a call on a tensor
        return rows  # type: ignore[return-value]  # a tensor

    @property
    def new(self) -> fx.Node:
        return self.node.args[3]  # type: ignore[return-value]  # a tensor

    def attentions(self) -> set[fx.Node]:
        """The attentions that read the cache."""
        return {n for n in readers(aliasing.root(self.cache)) if g.is_call(n, *ATTENTIONS)}


def group_cache_writes(graph: fx.Graph) -> int:
    """index_copy_(keys, ..), index_copy_(values, ..) -> rope_write or cache_write; returns how many.

    The writes of one layer are two at the same rows, of tensors of one shape, for one attention if any. The
    rotation is taken in where it makes the keys that are written, for nothing else; with it the norms of q
    and k.
    """
    grouped = 0
    while (pair := _next_pair(graph)) is not None:
        grouped += 1
        _group(graph, *pair)
    g.eliminate_dead_code(graph)
    return grouped


def _next_pair(graph: fx.Graph) -> tuple[Write, Write, fx.Node | None] | None:
    """The first two writes that become one, keys first, and the rotation that they take in."""
    order = _order(graph)
    writes = [Write(n) for n in graph.nodes if _is_cache_write(n)]
    for i, first in enumerate(writes):
        for second in writes[i + 1 :]:
            if _different(first, second) is not None:
                continue
            rotation = _rotation(first, second, order) or _rotation(second, first, order)
            if rotation is not None:
                keys = first if first.new.args[0] is rotation else second
                return keys, second if keys is first else first, rotation
            if _late(first, second, (), order) is None:
                return first, second, None
    return None


def _is_cache_write(node: fx.Node) -> bool:
    """Whether a call writes rows of a cache."""
    if not g.is_call(node, aten.index_copy_.default) or node.args[1] not in (-2, POSITIONS):
        return False
    cache, _, position, new = node.args
    return g.rank(cache) == CACHE_RANK == g.rank(new) and g.rank(position) == 1  # type: ignore[arg-type]  # tensors


def _different(first: Write, second: Write) -> str | None:
    """Why two writes are not those of one layer's keys and values."""
    if first.position is not second.position:
        return f"{second.node.name} writes other rows than {first.node.name}"
    one, two = first.attentions(), second.attentions()
    if (one or two) and one.isdisjoint(two):
        return f"no attention reads both {first.cache.name} and {second.cache.name}"
    for mine, other in ((first.new, second.new), (first.cache, second.cache)):
        if not g.same_shape(g.shape(mine), g.shape(other)) or g.dtype(mine) != g.dtype(other):
            return f"{mine.name} and {other.name} differ in shape or dtype"
    if aliasing.root(first.cache) is aliasing.root(second.cache):
        return f"{first.cache.name} and {second.cache.name} are one memory"
    return None


def _rotation(keys: Write, values: Write, order: dict[fx.Node, int]) -> fx.Node | None:
    """The rope whose second result is the keys that are written, if the call can move to the writes."""
    new = keys.new
    if new.target is not operator.getitem or new.args[1] != 1 or set(new.users) != {keys.node}:
        return None
    rope = new.args[0]
    if not isinstance(rope, fx.Node) or not g.is_call(rope, ops.rope.overload):
        return None
    q, k = g.arg(rope, "q"), g.arg(rope, "k")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    if not g.same_size(g.shape(q)[-1], g.shape(k)[-1]):
        return None
    rotated = [user for user in rope.users if user is not new]
    return rope if _late(keys, values, (*rotated, rope), order) is None else None


def _late(first: Write, second: Write, moved: Sequence[fx.Node], order: dict[fx.Node, int]) -> str | None:
    """Why what makes the first write cannot wait for the last; `moved` waits with it, its readers have to."""
    start, end = sorted((first.node, second.node), key=order.__getitem__)
    readers = {user for node in (start, *moved) for user in node.users} - {first.node, second.node}
    early = [r.name for r in readers - {*moved, first.new, second.new} if order[r] < order[end]]
    if early:
        return f"{early[0]} reads it before {end.name}"
    begin = min((start, *moved), key=order.__getitem__)
    read = {n for node in (first.node, second.node, *moved) for n in node.all_input_nodes}
    memories = {aliasing.root(n) for n in read}
    older = family(aliasing.root(start.args[0]), start)  # type: ignore[arg-type]  # a node
    node = begin
    while node is not end:
        written = {aliasing.root(n) for n in aliasing.written_arguments(node)}
        if node not in (first.node, second.node) and written & memories:
            return f"{node.name} writes what is read by {end.name}"
        if order[node] > order[start] and older & set(node.all_input_nodes):
            return f"{node.name} reads {start.args[0]} between the writes"
        node = node.next
    return None


def _group(graph: fx.Graph, keys: Write, values: Write, rope: fx.Node | None) -> None:
    """Put one call in place of both writes and the rotation."""
    order = _order(graph)
    place = max(keys.node, values.node, key=order.__getitem__)
    with graph.inserting_before(place):
        start = _start(keys.position, place, order)
        rows = (keys.position, None) if start is None else (None, start)
        if rope is None:
            arguments = (keys.new, values.new, keys.cache, values.cache, *rows)
            insert_call(graph, keys.node, ops.cache_write.overload, *arguments)
        else:
            turned = insert_call(
                graph, rope, ops.rope_write.overload, *_rope_arguments(graph, keys, values, rope), *rows
            )
            for user in list(rope.users):
                if user.args[1] == 0:
                    user.replace_all_uses_with(turned)
    for write in (keys, values):
        write.node.replace_all_uses_with(write.cache)
        graph.erase_node(write.node)


def _rope_arguments(graph: fx.Graph, keys: Write, values: Write, rope: fx.Node) -> list[object]:
    """The arguments of `rope_write` before the rows."""
    q, k, cos, sin, rotary, pairs = (
        g.arg(rope, n) for n in ("q", "k", "cos", "sin", "rotary_dim", "interleaved")
    )
    normed = _normed(q, k)
    if normed is None:
        norms: tuple[object, ...] = (None, None, 0.0, 0.0, True)
    else:
        one, two = normed
        norms = g.arg(one, "weight"), g.arg(two, "weight"), *(g.arg(one, n) for n in NORM_ARGUMENTS)
        q, k = (_without(graph, x, norm) for x, norm in ((q, one), (k, two)))  # type: ignore[arg-type]  # nodes
    return [q, k, values.new, cos, sin, rotary, pairs, *norms, keys.cache, values.cache]


def _normed(q: object, k: object) -> tuple[fx.Node, fx.Node] | None:
    """The rms norms over head_dim that make q and k, for nothing else, if both are alike."""
    norms = [_norm_of(x) for x in (q, k)]
    one, two = norms
    if one is None or two is None or one is two:
        return None
    alike = all(_same(g.arg(one, name), g.arg(two, name)) for name in NORM_ARGUMENTS)
    return (one, two) if alike else None


def _norm_of(x: object) -> fx.Node | None:
    """The norm behind a query: right before it, or before a permutation that leaves the last dimension."""
    if g.is_call(x, aten.permute.default):
        assert isinstance(x, fx.Node)
        dims = x.args[1]
        if len(x.users) != 1 or not isinstance(dims, (list, tuple)) or dims[-1] not in (-1, CACHE_RANK - 1):
            return None
        x = x.args[0]
    if not g.is_call(x, ops.rms_norm.overload):
        return None
    assert isinstance(x, fx.Node)
    source = g.arg(x, "x")
    assert isinstance(source, fx.Node)
    fits = len(x.users) == 1 and g.arg(x, "weight") is not None and g.dtype(source) == g.dtype(x)
    kept = aliasing.root(source).op == "call_function"  # an input might be written before it is read
    return x if fits and kept and g.rank(source) == CACHE_RANK else None


def _same(a: object, b: object) -> bool:
    return a is b or (not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b)


def _without(graph: fx.Graph, x: fx.Node, norm: fx.Node) -> fx.Node:
    """What a query is made of, without its norm."""
    source = g.arg(norm, "x")
    assert isinstance(source, fx.Node)
    if x is norm:
        return source
    return insert_call(graph, x, aten.permute.default, source, x.args[1])


def _start(position: fx.Node, place: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """t where position is arange(S) + t: one integer on the device, still what it was at the place."""
    if not g.is_call(position, aten.add.Tensor) or g.arg(position, "alpha") != 1:
        return None
    for steps, start in (position.args[:2], position.args[1::-1]):
        if not (isinstance(steps, fx.Node) and isinstance(start, fx.Node) and _counts(steps)):
            continue
        if not g.is_tensor(start) or g.rank(start) != 0 or g.dtype(start) not in (torch.int64, torch.int32):
            continue
        if g.device(start) != g.device(position):  # a scalar on the CPU: torch takes it, a kernel cannot
            continue
        memory = aliasing.root(start)
        node = position
        while node is not place:
            if memory in {aliasing.root(n) for n in aliasing.written_arguments(node)}:
                return None
            node = node.next
        return start
    return None


def _counts(node: fx.Node) -> bool:
    """Whether a node is 0, 1, 2, ..."""
    if g.is_call(node, aten.arange.default):
        return True
    if not g.is_call(node, aten.arange.start, aten.arange.start_step):
        return False
    return g.number(node.args[0]) == 0 and g.number(node.args[2] if len(node.args) > 2 else 1) == 1


def _order(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}
