"""Which node of one graph stands for which of another: by origin, then by sequence, then by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import fx

from graphopt.graph import flat_arguments, is_call, module_path, op_name, origin, source, val, weight_names
from graphopt.listing import call, describe


@dataclass
class Rewrite:
    """One match's rewrite: the nodes of the first graph that went, the nodes of the second that came."""

    rule: str
    match: str
    removed: list[fx.Node]
    added: list[fx.Node]


@dataclass
class Alignment:
    """Two graphs' nodes, each either of a pair, of a rewrite, removed or added."""

    before: list[fx.Node]
    after: list[fx.Node]
    rewrites: list[Rewrite]
    old_of: dict[fx.Node, fx.Node]  # node of b -> its node of a
    removed: list[fx.Node]  # of a, in no rewrite
    added: list[fx.Node]  # of b, in no rewrite


def align(before: list[fx.Node], after: list[fx.Node]) -> Alignment:
    """Align the nodes of two graphs, each in its graph's order."""
    rewrites = _by_origin(before, after)
    taken = {n for r in rewrites for n in (*r.removed, *r.added)}
    old = [n for n in before if n not in taken]
    new = [n for n in after if n not in taken]
    old_of = _by_sequence(old, new)
    for key in (_name_key, _place_key):
        paired = set(old_of.values())
        rest = [n for n in old if n not in paired], [n for n in new if n not in old_of]
        old_of |= _by_key(*rest, key)
    paired = set(old_of.values())
    removed = [n for n in old if n not in paired]
    _give_dead_code_to_rewrites(removed, rewrites)
    number_of = {n: i for i, n in enumerate(before)}
    for rewrite in rewrites:
        rewrite.removed.sort(key=number_of.__getitem__)
    added = [n for n in new if n not in old_of]
    rewrites += _without_old_nodes(added)
    taken = {n for r in rewrites for n in (*r.removed, *r.added)}
    left = [n for n in removed if n not in taken], [n for n in added if n not in taken]
    return Alignment(before, after, rewrites, old_of, *left)


def _by_origin(before: list[fx.Node], after: list[fx.Node]) -> list[Rewrite]:
    """The rewrites between the two graphs: matches that a has not seen, and whose old nodes it still has."""
    named = {n.name: n for n in before}
    done = {made_by.match for n in before if (made_by := origin(n))}
    found: dict[str, Rewrite] = {}
    for node in after:
        made_by = origin(node)
        if made_by is None or made_by.match in done:
            continue
        rewrite = found.setdefault(made_by.match, Rewrite(made_by.rule, made_by.match, [], []))
        rewrite.added.append(node)
        replaced = [named[n] for n in made_by.replaced if n in named]
        rewrite.removed += [n for n in replaced if n not in rewrite.removed]
    kept = {(n.name, op_name(n)) for n in after if origin(n) is None}
    for rewrite in found.values():
        # A rewrite may name nodes that others still read: they stayed, so they are not its to remove.
        rewrite.removed = [n for n in rewrite.removed if (n.name, op_name(n)) not in kept]
    return [r for r in found.values() if r.removed]


def _without_old_nodes(added: list[fx.Node]) -> list[Rewrite]:
    """Rewrites of what earlier rewrites had made: the first graph has none of the nodes they replaced."""
    found: dict[str, Rewrite] = {}
    for node in added:
        made_by = origin(node)
        if made_by is not None:
            found.setdefault(made_by.match, Rewrite(made_by.rule, made_by.match, [], [])).added.append(node)
    return list(found.values())


def _token(node: fx.Node) -> tuple[str, ...]:
    """What makes two nodes the same but for their inputs: the call, the type and the place."""
    label = ",".join(weight_names(node)) or (str(node.target) if not is_call(node) else module_path(node))
    return node.op, skeleton(node), describe(val(node)), label


def skeleton(node: fx.Node) -> str:
    """A node's call with its literals, without its inputs; for other nodes only what kind they are."""
    return call(node, lambda _: "%") if is_call(node) else node.op


def _by_sequence(old: list[fx.Node], new: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    matcher = SequenceMatcher(None, [_token(n) for n in old], [_token(n) for n in new], autojunk=False)
    blocks = matcher.get_matching_blocks()
    return {new[block.b + i]: old[block.a + i] for block in blocks for i in range(block.size)}


def _name_key(node: fx.Node) -> tuple[str, ...]:
    return op_name(node), f"{module_path(node)}:{node.name}"


def _place_key(node: fx.Node) -> tuple[str, ...]:
    return op_name(node), module_path(node), source(node)


def _by_key(
    old: list[fx.Node], new: list[fx.Node], key: Callable[[fx.Node], tuple[str, ...]]
) -> dict[fx.Node, fx.Node]:
    """Pair nodes whose key occurs as often on both sides, in order; a key with an empty part pairs none."""
    sides: dict[tuple[str, ...], tuple[list[fx.Node], list[fx.Node]]] = {}
    for side, nodes in enumerate((old, new)):
        for node in nodes:
            sides.setdefault(key(node), ([], []))[side].append(node)
    return {
        n: o
        for known, (left, right) in sides.items()
        if len(left) == len(right) and all(known)
        for o, n in zip(left, right, strict=True)
    }


def _give_dead_code_to_rewrites(removed: list[fx.Node], rewrites: list[Rewrite]) -> None:
    """A removed node that only one rewrite's removed nodes read died of that rewrite."""
    owner = {n: r for r in rewrites for n in r.removed}
    for node in reversed(removed):
        readers = [owner.get(user) for user in node.users]
        first = readers[0] if readers else None
        if first is not None and all(reader is first for reader in readers):
            owner[node] = first
            first.removed.append(node)


class Sameness:
    """Whether two aligned nodes still say the same: equal calls whose inputs are aligned with each other."""

    def __init__(self, aligned: Alignment) -> None:
        self.old_of = aligned.old_of
        self.paired = set(aligned.old_of.values())
        self.rewrites_of: dict[fx.Node, set[str]] = {}
        for r in aligned.rewrites:
            for node in (*r.removed, *r.added):
                self.rewrites_of.setdefault(node, set()).add(r.match)

    def calls(self, old: fx.Node, new: fx.Node) -> bool:
        """Whether a node that stayed is unchanged."""
        if _token(old)[:3] != _token(new)[:3]:
            return False
        before, after = reads(old), reads(new)
        return len(before) == len(after) and all(map(self._inputs, before, after))

    def _inputs(self, old: fx.Node, new: fx.Node) -> bool:
        # A removed or added node on the way (a cast that went) has its own line; its readers did not change.
        while not self._settled(old) and reads(old):
            old = reads(old)[0]
        while new not in self.old_of and new not in self.rewrites_of and reads(new):
            new = reads(new)[0]
        if self.old_of.get(new) is old:
            return True
        return bool(self.rewrites_of.get(old, set()) & self.rewrites_of.get(new, set()))

    def _settled(self, old: fx.Node) -> bool:
        return old in self.paired or old in self.rewrites_of


def reads(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in the order of its arguments and with repetition."""
    return [n for n in flat_arguments(node) if isinstance(n, fx.Node)]
