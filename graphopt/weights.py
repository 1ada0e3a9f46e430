"""What is made of weights once and kept outside every graph, keyed by the tensors that it is made from.

cat([w_q, w_k, w_v]) runs at first use, and again only when a source changed: in place, replaced, loaded.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import fx

from graphopt import torch_private
from graphopt.errors import WeightError
from graphopt.observe import Observer, Warned, emit

log = logging.getLogger(__name__)

# Mapped over all sources in C: 300 checks of identity, version and pointer take 42 us.
_version = attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr


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


@dataclass(frozen=True, eq=False)
class _Entry:
    """One prepared tensor and the state of the sources it was made from."""

    state: tuple[tuple[int, int], ...]  # (version, data pointer) of each source
    value: torch.Tensor
    nbytes: int  # 0 where it is a view of a source
    watch: tuple[weakref.ref[torch.Tensor], ...]  # each drops the entry when its source dies


class WeightStore:
    """Prepared weights of any number of models and graphs.

    An entry is keyed by the identity of its source tensors and the plan's hash, and is made again when a
    source's `_version` or data pointer changed. It holds no source: when one dies, the entry goes. In-place
    operations, replaced parameters and `load_state_dict` are seen at the next call; writes through `p.data`
    and numpy leave no trace and need `refresh()`. Safe to call from several threads; a prepare runs once.

    Attributes:
        prepared: how often a prepare graph has run.
        observers: told (`Warned`) when weights cannot be kept.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self.prepared = 0
        self.observers = observers
        self._entries: dict[tuple[str, tuple[int, ...]], _Entry] = {}
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

    def get(self, sources: tuple[torch.Tensor, ...], plan: PreparePlan) -> torch.Tensor:
        """The plan's result for these tensors, prepared now if it is missing or out of date."""
        state = _state(sources)
        if state is None:
            self._warn_uncached(sources, plan)
            return self._prepare(sources, plan)
        key = (plan.hash, tuple(map(id, sources)))
        entry = self._entries.get(key)
        if entry is not None and entry.state == state:
            return entry.value
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.state != state:
                self._drop_stale(key[1], state)
                value = self._prepare(sources, plan)
                watch = tuple(weakref.ref(s, _Dropper(self, key)) for s in sources)
                entry = self._entries[key] = _Entry(state, value, _nbytes(value, sources), watch)
            return entry.value

    def _drop_stale(self, identities: tuple[int, ...], state: tuple[tuple[int, int], ...]) -> None:
        """Drop what other plans made of an older state of the same tensors: after `model.to(dtype)`, say."""
        stale = [k for k, e in list(self._entries.items()) if k[1] == identities and e.state != state]
        for key in stale:
            self._entries.pop(key, None)

    def refresh(self, sources: Iterable[torch.Tensor] | None = None) -> None:
        """Forget what was made of these tensors, or all: for writes that leave no trace (`p.data`, numpy)."""
        changed = None if sources is None else set(map(id, sources))
        with self._lock:
            self._epoch += 1
            for key in list(self._entries):
                if changed is None or not changed.isdisjoint(key[1]):
                    self._entries.pop(key, None)
            self._forget_sets()

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

    def _forget(self, key: tuple[str, tuple[int, ...]]) -> None:
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

    def __init__(self, store: WeightStore, key: tuple[str, tuple[int, ...]]) -> None:
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
        epoch, state = self.store._epoch, _state(sources)
        values = tuple(
            self.store.get(tuple(sources[i] for i in at), plan)
            for plan, at in zip(self.plans, self.arguments, strict=True)
        )
        if state is None:
            return values
        with self.store._lock:  # against a refresh between the look-up and here
            if epoch == self.store._epoch:
                versions, pointers = zip(*state, strict=True)
                self._sets[tuple(map(id, sources))] = _WeightSet(versions, pointers, values)
        return values

    def __repr__(self) -> str:
        return f"Prepared({len(self.plans)} weights)"

    def __reduce__(self) -> tuple[type[Prepared], tuple[object, ...]]:
        return Prepared, (self.store, self.plans, self.arguments)


def prepared_weights(prepared: Prepared, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The call that a lowered graph makes once, at its start: prepared weights for those it was given."""
    return prepared.forward(*sources)  # past nn.Module.__call__: 2 us


def _state(sources: tuple[torch.Tensor, ...]) -> tuple[tuple[int, int], ...] | None:
    """Version and data pointer of each tensor; None where one has none to trust (inference, fake)."""
    if any(s.is_inference() or isinstance(s, torch_private.FakeTensor) for s in sources):
        return None
    return tuple((s._version, s.data_ptr()) for s in sources)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """What a weight becomes must not depend on the mode of the first call."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def _nbytes(value: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> int:
    storage = value.untyped_storage()
    if any(storage.data_ptr() == s.untyped_storage().data_ptr() for s in sources):
        return 0
    return storage.nbytes()
