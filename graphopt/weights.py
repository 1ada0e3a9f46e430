"""What is made of weights once and kept outside every graph, keyed by the tensors that it is made from.

cat([w_q, w_k, w_v]) runs at first use, and again only when a source changed: in place, replaced, loaded.
Of a model that is owned (`ownership`), the sources are released, weight by weight, as they are prepared.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import fx

from graphopt import graph as g
from graphopt import ownership, torch_private
from graphopt.errors import ReleasedError, WeightError
from graphopt.observe import Observer, Warned, emit

log = logging.getLogger(__name__)

# Mapped over all sources in C: 300 checks of identity, version and pointer take 42 us.
_version = attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr

LOOKED_AT = 1 << 20  # elements that are looked at at once


@dataclass(frozen=True, eq=False)
class PreparePlan:
    """A pure graph from weights to one prepared tensor.

    Attributes:
        gm: `gm(*sources)` gives the prepared tensor.
        hash: what it computes (operators, literals, constants' contents); equal plans share their results.
        sources: which of the calling graph's placeholders its arguments are.
        names: the sources' names, for messages.
    """

    gm: fx.GraphModule
    hash: str
    sources: tuple[int, ...]
    names: tuple[str, ...]

    def moves(self) -> tuple[int, ...]:
        """The sources whose strides change when they are released: they are no rows of the result."""
        ways = ownership.ways(self.gm)
        stay = {i for i, way in ways.items() if ownership.keeps_layout(way)}
        stay |= ownership.pinned(self.gm) | ownership.repeated(self.gm)
        return tuple(source for i, source in enumerate(self.sources) if i not in stay)


Key: TypeAlias = "tuple[str, tuple[int, ...]]"  # a plan's hash, its sources' identities
State: TypeAlias = "tuple[tuple[int, int], ...]"  # (version, data pointer) of each source
ANY = -1  # the version of a source that is an alias of what was prepared: writes to it are writes to that


@dataclass(eq=False)
class Entry:
    """One prepared tensor and the state of the sources it was made from."""

    plan: PreparePlan
    state: State
    value: torch.Tensor
    nbytes: int  # 0 where it is a view of a source
    watch: tuple[weakref.ref[torch.Tensor], ...]  # each drops the entry when its source dies

    def fits(self, state: State) -> bool:
        """Whether it is what these sources would give now."""
        return self.state == state or all(
            p == q and v in (w, ANY) for (v, p), (w, q) in zip(self.state, state, strict=True)
        )


class WeightStore:
    """Prepared weights of any number of models and graphs.

    An entry is keyed by the identity of its source tensors and the plan's hash, and is made again when a
    source's `_version` or data pointer changed. It holds no source: when one dies, the entry goes. In-place
    operations, replaced parameters and `load_state_dict` are seen at the next call; writes through `p.data`
    and numpy leave no trace and need `refresh()`. Safe to call from several threads; a prepare runs once.

    Attributes:
        prepared: how often a prepare graph has run.
        observers: told (`Warned`) when weights cannot be kept.
        owners: the models whose weights are released once they are prepared.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self.prepared = 0
        self.observers = observers
        self.owners = ownership.Owners()
        self._entries: dict[Key, Entry] = {}
        self._bound: dict[int, dict[tuple[int, ...], _WeightSet]] = {}  # the fast paths of all `Prepared`
        self._lock = threading.RLock()
        self._epoch = 0  # counts refreshes
        self._warned = False

    def __len__(self) -> int:
        """The number of prepared tensors held."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """The memory that prepared tensors hold, in bytes; views of a source count nothing."""
        return sum(entry.nbytes for entry in list(self._entries.values()))

    def get(
        self, sources: tuple[torch.Tensor, ...], plan: PreparePlan, ours: Set[int] = frozenset()
    ) -> torch.Tensor:
        """The plan's result for these tensors, prepared now if it is missing or out of date.

        Args:
            ours: the ids of sources that will be released: the result is no part of one.
        """
        state = _state(sources)
        if state is None:
            self._warn_uncached(sources, plan)
            return self._prepare(sources, plan)
        key = (plan.hash, tuple(map(id, sources)))
        entry = self._entries.get(key)
        if entry is not None and entry.fits(state):
            return entry.value
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.fits(state):
                self._refuse_released(sources, plan)
                self._drop_stale(key[1], state)
                value = self._prepare(sources, plan)
                part = [i for i, s in enumerate(sources) if id(s) in ours and _is_part(value, s)]
                if part and not ownership.pinned(plan.gm).issuperset(part):
                    value = value.clone(memory_format=torch.contiguous_format)
                entry = self.keep(sources, plan, value, state)
            return entry.value

    def keep(
        self, sources: tuple[torch.Tensor, ...], plan: PreparePlan, value: torch.Tensor, state: State
    ) -> Entry:
        """Hold what was prepared of sources in that state."""
        key = (plan.hash, tuple(map(id, sources)))
        watch = tuple(weakref.ref(s, _Dropper(self, key)) for s in sources)
        entry = self._entries[key] = Entry(plan, state, value, _nbytes(value, sources), watch)
        return entry

    def entries(self, source: torch.Tensor | None = None) -> list[tuple[tuple[torch.Tensor, ...], Entry]]:
        """What is held and still right, with its sources; of one source, or of all."""
        found = []
        for key, entry in list(self._entries.items()):
            sources = tuple(s for s in (ref() for ref in entry.watch) if s is not None)
            if len(sources) < len(entry.watch) or (source is not None and id(source) not in key[1]):
                continue
            state = _state(sources)
            if state is not None and entry.fits(state):
                found.append((sources, entry))
        return found

    def _refuse_released(self, sources: tuple[torch.Tensor, ...], plan: PreparePlan) -> None:
        """Raise for a source whose bytes are gone, with what is held of it."""
        for source, name in zip(sources, plan.names, strict=True):
            gone = ownership.is_stand_in(source)
            if not gone and source in self.owners.released and source.isnan().all():
                gone = True  # a stand-in that was cast or moved
            if gone:
                held = [
                    f"{e.plan.hash} {list(e.value.shape)} {e.value.dtype}" for _, e in self.entries(source)
                ]
                others = [n for n in plan.names if n != name]
                together = f"; it is made of {', '.join(others)} too: load them together" if others else ""
                raise ReleasedError(
                    f"weight {name} {list(source.shape)} was released, and the form {plan.hash} of it that "
                    f"the program needs is not held (held: {', '.join(held) or 'nothing'}){together}; "
                    f"{ownership.WAY_OUT}"
                )

    def admit(self, weights: Iterable[object]) -> None:
        """A program is about to read these as they are: they stay. ReleasedError if one was released."""
        with self._lock:
            self.owners.admit(weights)

    def release(self, source: torch.Tensor) -> None:
        """Let go of an owned weight's memory: it becomes an alias of a prepared form, or a stand-in.

        Not where a form is a view of it, or it of one already; nor where nothing would be saved.
        """
        held = self.entries(source)
        if not held or ownership.is_stand_in(source) or any(_shares(e.value, source) for _, e in held):
            return
        home, new, needed = None, None, False
        for sources, entry in held:
            at = next(i for i, s in enumerate(sources) if s is source)
            gm = entry.plan.gm
            needed |= at in ownership.pinned(gm) or at in ownership.repeated(gm)
            needed |= not entry.plan.sources  # loaded: not known
            way = ownership.ways(entry.plan.gm).get(at)
            if way is not None and home is None:
                home, new = entry, ownership.follow(way, entry.value)
        with torch.inference_mode(False):
            if new is not None:
                source.data = new
            elif ownership.can_stand_in(source) and not needed:
                self.owners.give_stand_in(source)
            else:
                return
        for sources, entry in held:
            state = (ANY if entry is home else source._version, source.data_ptr())
            entry.state = tuple(
                state if s is source else old for s, old in zip(sources, entry.state, strict=True)
            )

    def _drop_stale(self, identities: tuple[int, ...], state: State) -> None:
        """Drop what other plans made of an older state of the same tensors: after `model.to(dtype)`, say."""
        stale = [k for k, e in list(self._entries.items()) if k[1] == identities and not e.fits(state)]
        for key in stale:
            self._entries.pop(key, None)

    def refresh(self, sources: Iterable[torch.Tensor] | None = None) -> None:
        """Forget what was made of these tensors, or all: for writes that leave no trace (`p.data`, numpy).

        What is the only form of a released weight is kept.
        """
        changed = None if sources is None else set(map(id, sources))
        with self._lock:
            self._epoch += 1
            for key, entry in list(self._entries.items()):
                if any(ownership.is_stand_in(ref()) for ref in entry.watch):
                    continue
                if changed is None or not changed.isdisjoint(key[1]):
                    self._entries.pop(key, None)
            self._forget_sets()

    def drop(self, plans: Set[str]) -> None:
        """Let go of what plans of these hashes made, as no program needs it; not of a source's only form."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                only = any(ownership.is_stand_in(ref()) for ref in entry.watch)
                if key[0] in plans and not only and all(version != ANY for version, _ in entry.state):
                    self._entries.pop(key, None)

    def look_again(self) -> None:
        """The next call of each program looks every weight up, and releases what it may."""
        with self._lock:
            self._epoch += 1
            self._forget_sets()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Within, what is prepared releases nothing; the next call of each program after it does."""
        if not self.owners:
            yield
            return
        with self._lock:
            self.owners.keeping += 1
        try:
            yield
        finally:
            with self._lock:
                self.owners.keeping -= 1
            self.look_again()

    def _prepare(self, sources: tuple[torch.Tensor, ...], plan: PreparePlan) -> torch.Tensor:
        # Not inside inference_mode: the results outlive it. Detached: a view would keep its source alive.
        with torch.inference_mode(False), torch.no_grad(), _without_autocast(sources[0].device.type):
            try:
                value = plan.gm(*(s.detach() for s in sources))
            except Exception as error:
                described = ", ".join(
                    f"{n} {tuple(s.shape)}" for n, s in zip(plan.names, sources, strict=True)
                )
                raise WeightError(f"cannot prepare a weight from {described}: {error}") from error
        self.prepared += 1
        return value

    def _warn_uncached(self, sources: tuple[torch.Tensor, ...], plan: PreparePlan) -> None:
        if self._warned or not any(s.is_inference() for s in sources):
            return
        self._warned = True
        message = (
            f"weight {plan.names[0]} was made under torch.inference_mode, so its changes cannot be seen: "
            "it is prepared at each call; make or load the model outside of inference_mode"
        )
        log.warning(message)
        emit(self.observers, Warned(message))

    def _forget(self, key: Key) -> None:
        # Runs in whatever thread frees the tensor, maybe in the middle of one of our own methods: no lock,
        # only single dict operations, which are atomic.
        self._entries.pop(key, None)
        self._forget_sets()

    def _forget_sets(self) -> None:
        for sets in list(self._bound.values()):
            sets.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> WeightStore:
        return self  # a copied graph shares what is prepared

    def __reduce__(self) -> tuple[type[WeightStore], tuple[()]]:
        return WeightStore, ()  # a stored graph prepares anew


class _Dropper:
    """The callback of a dying source; holds the store weakly, so that the store can die too."""

    __slots__ = ("key", "store")

    def __init__(self, store: WeightStore, key: Key) -> None:
        self.store = weakref.ref(store)
        self.key = key

    def __call__(self, _: weakref.ref[torch.Tensor]) -> None:
        store = self.store()
        if store is not None:
            store._forget(self.key)


@dataclass(frozen=True, eq=False, slots=True)
class _WeightSet:
    """What one call of `Prepared` found for one set of tensors."""

    versions: tuple[int, ...]
    pointers: tuple[int, ...]
    values: tuple[torch.Tensor, ...]


class Prepared(torch.nn.Module):
    """All prepared weights of one graph: from the sources to the prepared tensors, in the plans' order.

    Args:
        store: where the results live.
        plans: what to prepare.
        arguments: for each plan, which of the call's arguments its sources are.
    """

    def __init__(
        self, store: WeightStore, plans: tuple[PreparePlan, ...], arguments: tuple[tuple[int, ...], ...]
    ) -> None:
        super().__init__()  # a module, because a graph may only hold modules and tensors
        self.store, self.plans, self.arguments = store, plans, arguments
        self._sets: dict[tuple[int, ...], _WeightSet] = {}
        store._bound[id(self)] = self._sets
        weakref.finalize(self, store._bound.pop, id(self), None)

    def forward(self, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The prepared tensors for these weights; a few comparisons where nothing changed."""
        known = self._sets.get(tuple(map(id, sources)))
        if (
            known is not None
            and tuple(map(_version, sources)) == known.versions
            and tuple(map(_data_ptr, sources)) == known.pointers
        ):
            return known.values
        return self._look_up(sources)

    def _look_up(self, sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        store = self.store
        epoch = store._epoch
        if store.owners:
            with store._lock:  # no thread may see a source that is being released
                values, state = self._prepare_and_release(sources), _state(sources)
        else:
            state = _state(sources)
            values = tuple(
                store.get(tuple(sources[i] for i in at), plan)
                for plan, at in zip(self.plans, self.arguments, strict=True)
            )
        if state is None:
            return values
        with store._lock:  # against a refresh between the look-up and here
            if epoch == store._epoch:
                versions, pointers = zip(*state, strict=True)
                self._sets[tuple(map(id, sources))] = _WeightSet(versions, pointers, values)
        return values

    def _prepare_and_release(self, sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Weight by weight, so that the peak is one weight above what stays."""
        ours = self.store.owners.releasable()
        self._require_finite(sources, ours)
        last = {i: n for n, at in enumerate(self.arguments) for i in at}  # the last plan that reads a source
        values = []
        for n, (plan, at) in enumerate(zip(self.plans, self.arguments, strict=True)):
            values.append(self.store.get(tuple(sources[i] for i in at), plan, ours))
            for source in (sources[i] for i in dict.fromkeys(at) if last[i] == n):
                if id(source) in ours and _state((source,)) is not None:
                    self.store.release(source)
        return tuple(values)

    def _require_finite(self, sources: tuple[torch.Tensor, ...], ours: Set[int]) -> None:
        """Look at all weights that are going to be packed before the first of them is released.

        Also at those that stay themselves (a tied table). Raises WeightError for NaN and infinity: packing
        would fail halfway, with other weights gone.
        """
        if ours.isdisjoint(map(id, sources)):
            return
        packed: dict[int, str] = {}
        for plan, at in zip(self.plans, self.arguments, strict=True):
            if _packs(plan):
                packed |= zip(at, plan.names, strict=True)
        for i, name in packed.items():
            source = sources[i]
            if ownership.is_stand_in(source) or _is_finite(source.detach()):
                continue
            if source in self.store.owners.released and bool(source.isnan().all()):
                continue  # a cast of a stand-in: `get` says that it is gone
            reason = ValueError("it has values that are not finite (NaN or infinity)")
            raise WeightError(f"cannot prepare weight {name} {tuple(source.shape)}: {reason}") from reason

    def __repr__(self) -> str:
        return f"Prepared({len(self.plans)} weights)"

    def __reduce__(self) -> tuple[type[Prepared], tuple[object, ...]]:
        return Prepared, (self.store, self.plans, self.arguments)


def _packs(plan: PreparePlan) -> bool:
    """Whether a plan puts weights into fewer bits, which numbers that are not finite do not survive."""
    return any(g.is_ours(node.target) and node.op == "call_function" for node in plan.gm.graph.nodes)


def _is_finite(x: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; a block of rows at a time, to hold little."""
    rows = max(1, LOOKED_AT // max(1, x[:1].numel())) if x.dim() else 1
    return all(bool(torch.isfinite(part).all()) for part in (x.split(rows) if x.dim() else (x,)))


def prepared_weights(prepared: Prepared, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The call that a lowered graph makes once, at its start: prepared weights for those it was given."""
    return prepared.forward(*sources)  # past nn.Module.__call__: 2 us


def _state(sources: tuple[torch.Tensor, ...]) -> State | None:
    """Version and data pointer of each tensor; None where one has none to trust (inference, fake)."""
    if any(s.is_inference() or isinstance(s, torch_private.FakeTensor) for s in sources):
        return None
    return tuple((s._version, s.data_ptr()) for s in sources)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """What a weight becomes must not depend on the mode of the first call."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def _shares(one: torch.Tensor, two: torch.Tensor) -> bool:
    pointer = one.untyped_storage().data_ptr()
    return pointer != 0 and pointer == two.untyped_storage().data_ptr()  # 0: on meta


def _is_part(value: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a value is a view of some of a source: it would keep all of it."""
    return value.numel() < source.numel() and _shares(value, source)


def _nbytes(value: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> int:
    if any(_shares(value, s) for s in sources):
        return 0
    return value.untyped_storage().nbytes()
