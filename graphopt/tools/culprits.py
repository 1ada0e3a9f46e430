"""Find the smallest set of rewrites that breaks something, by leaving the others out.

Whatever a run is (a model judged by its outputs, a command by its exit status), the search is the same. It
goes from coarse to fine, each step a delta debugging of the one before: passes; rules; a rule's places, where
identical layers are one; layers; single matches. Rewrites that are wrong only together are found together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt import defaults
from graphopt.errors import BisectError
from graphopt.listing import template
from graphopt.lowering.select import REFERENCE
from graphopt.observe import Event, KernelChosen, Matched, PassStarted
from graphopt.options import Options
from graphopt.pipeline import Pass
from graphopt.steering import Steering
from graphopt.tools.ddmin import ddmin

# Every pass that one process may run, in order: what is asked for adds its own.
PASSES: Mapping[str, Pass] = {
    p.name: p for p in defaults.pipeline(Options(quantize="int8", target="cuda:90")).passes
}
ROUNDS = 8  # what is denied may uncover a smaller match, which is then denied, too
MOST = 200  # runs
COMPILED = (
    "it has to call torch.compile(backend='graphopt'), optimize or enable, in a Python that reads PYTHONPATH"
)


@dataclass(frozen=True)
class Rewrite:
    """What a compilation did and can be kept from doing: a match, the choice of a kernel, or a whole pass."""

    pass_name: str
    rule: str = ""  # the match's rule, or `op/kernel`; empty for the pass itself
    match: str = ""  # the match's stable id
    module_path: str = ""
    source: str = ""
    needs: tuple[str, ...] = ()  # keys of the matches whose results it rewrites

    @property
    def key(self) -> str:
        """What it is called by: the match's id, `op/kernel`, or the pass's name."""
        return self.match or self.rule or self.pass_name


@dataclass(frozen=True)
class Trial:
    """One run with some rewrites left out: why it is broken (None: it is not), and what was rewritten."""

    broken: str | None
    rewrites: tuple[Rewrite, ...] = ()
    passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """The culprits; `needs` are rewrites without which they cannot be, innocent by themselves."""

    culprits: tuple[Rewrite, ...]
    needs: tuple[Rewrite, ...]
    broken: str  # what a run with these alone is said to be
    candidates: int  # rewrites of the whole run
    runs: int
    passes: tuple[str, ...] = ()  # that have to run for it
    steering: Steering = field(default_factory=Steering)  # that leaves these alone


class Recorder:
    """Observes compilations: which passes ran, and what each rewrote."""

    def __init__(self) -> None:
        self.passes: dict[str, None] = {}
        self.rewrites: dict[str, Rewrite] = {}
        self._pass = ""
        self._made: dict[str, str] = {}  # node -> the match that made it, of the graph at hand

    def on_event(self, event: Event) -> None:
        """Keep it."""
        if isinstance(event, PassStarted):
            self._pass = event.name
            self._made = {} if event.index == 0 else self._made
            self.passes[event.name] = None
        elif isinstance(event, Matched):
            m = event.match
            needs = dict.fromkeys(self._made[name] for name in m.nodes if name in self._made)
            self._made.update(dict.fromkeys(m.new_nodes, m.id))
            self.keep(Rewrite(self._pass, m.rule, m.id, m.module_path, m.source, tuple(needs)))
        elif isinstance(event, KernelChosen) and event.kernel != REFERENCE:
            self.keep(Rewrite(self._pass, f"{event.op}/{event.kernel}"))

    def keep(self, rewrite: Rewrite) -> None:
        """One rewrite; several graphs may have it."""
        self.rewrites.setdefault(rewrite.key, rewrite)


# --------------------------------------------------------------------------------------------------- search

LEVELS: tuple[tuple[str, Callable[[Rewrite], object]], ...] = (
    ("rule", lambda r: (r.pass_name, r.rule)),
    ("place", lambda r: (r.pass_name, r.rule, template(r.module_path))),  # identical layers are one
    ("layer", lambda r: tuple(re.findall(r"\d+", r.module_path))),
    ("match", lambda r: r.key),
)


def find(run: Callable[[Steering], Trial], most: int = MOST) -> Found | None:
    """The smallest set of rewrites with which a run is broken; None where a run with all of them is not.

    Args:
        run: compiles and runs anew under a steering, from the same state each time.
        most: how many runs it may take.

    Raises:
        BisectError: it is broken without any rewrite, the same rewrites had two results, nothing was
            compiled, or `most` was not enough.
    """
    search = _Search(run, most)
    whole = search.everything(None)
    search.again(None, None, whole)
    if not whole.passes:
        result = whole.broken or "nothing is broken"
        raise BisectError(f"no pass ran ({result}): nothing was compiled with graphopt; {COMPILED}")
    if whole.broken is None:
        return None
    foreign = [name for name in whole.passes if name not in PASSES]
    if foreign:
        raise BisectError(f"pass {foreign[0]} cannot be left out; bisect without it")
    nothing = search.everything(())
    search.again((), None, nothing)
    if nothing.broken is not None:
        raise BisectError(
            f"it is broken without any rewrite, too: {nothing.broken}; the cause is the capture, the run "
            "itself or the tolerance"
        )
    passes = search.guilty_passes(whole.passes)
    needed = _closed(passes)
    atoms = search.everything(needed).rewrites
    if search.part(needed, ()).broken is not None:
        return search.found(tuple(Rewrite(name) for name in passes), (), needed, (), len(whole.rewrites))
    atoms = search.smallest(needed, atoms)
    while (before := search.before(atoms)) and search.part(needed, before).broken is not None:
        atoms = search.smallest(needed, tuple(r for r in search.known.values() if r.key in before))
    inside = search.prerequisites(needed, atoms)
    needs = (*(search.known[key] for key in search.before(atoms)), *inside)
    culprits = tuple(r for r in atoms if r not in inside)
    return search.found(culprits, needs, needed, [r.key for r in atoms], len(whole.rewrites))


def _closed(passes: Iterable[str]) -> tuple[str, ...]:
    """The passes, and the first of the pipeline that provide what they require, in order."""
    chosen = set(passes)
    todo = list(chosen)
    while todo:
        for need in PASSES[todo.pop()].requires:
            provider = next(name for name, p in PASSES.items() if need in p.provides)
            if provider not in chosen:
                chosen.add(provider)
                todo.append(provider)
    return tuple(name for name in PASSES if name in chosen)


@dataclass
class _Search:
    """Runs each set of rewrites once, and counts."""

    run: Callable[[Steering], Trial]
    most: int
    runs: int = 0
    known: dict[str, Rewrite] = field(default_factory=dict)  # every match that was ever applied
    trials: dict[object, Trial] = field(default_factory=dict)

    def everything(self, passes: Sequence[str] | None) -> Trial:
        """All that these passes do; None for all passes."""
        key = None if passes is None else frozenset(passes)
        if key not in self.trials:
            self.trials[key] = self.once(self.steering(passes, None))
        return self.trials[key]

    def part(self, passes: Sequence[str], chosen: Collection[str]) -> Trial:
        """Of what these passes do, the chosen matches and kernels alone, and what the matches rewrite."""
        chosen = self.closed(chosen)
        key = frozenset(passes), frozenset(chosen)
        for _ in range(ROUNDS if key not in self.trials else 0):
            trial = self.trials[key] = self.once(self.steering(passes, chosen))
            if all(r.key in chosen for r in trial.rewrites if r.match):
                break
        return self.trials[key]

    def before(self, rewrites: Iterable[Rewrite]) -> tuple[str, ...]:
        """The matches whose results these rewrite, and those before them, without these."""
        given = {r.key: r for r in rewrites}
        found: dict[str, None] = {}
        todo = [key for r in given.values() for key in r.needs]
        while todo:
            key = todo.pop()
            if key not in found and key not in given and key in self.known:
                found[key] = None
                todo += self.known[key].needs
        return tuple(key for key in self.known if key in found)

    def closed(self, chosen: Collection[str]) -> set[str]:
        """The chosen, with the matches whose results they rewrite."""
        return {*chosen, *self.before([self.known[key] for key in chosen if key in self.known])}

    def smallest(self, passes: Sequence[str], atoms: tuple[Rewrite, ...]) -> tuple[Rewrite, ...]:
        """Of some rewrites, of which all together break, the smallest part that does: level by level."""
        for _, level in LEVELS:
            groups: dict[object, list[Rewrite]] = {}
            for atom in atoms:
                groups.setdefault(level(atom), []).append(atom)

            def breaks(names: Iterable[object], groups: dict[object, list[Rewrite]] = groups) -> bool:
                return self.part(passes, [r.key for n in names for r in groups[n]]).broken is not None

            atoms = tuple(r for name in ddmin(tuple(groups), breaks) for r in groups[name])
        return atoms

    def once(self, steering: Steering) -> Trial:
        """One run. Raises BisectError above `most`."""
        self.runs += 1
        if self.runs > self.most:
            raise BisectError(f"no answer after {self.most} runs; allow more")
        trial = self.run(steering)
        for r in trial.rewrites:
            if r.match:
                self.known.setdefault(r.key, r)
        return trial

    def steering(self, passes: Sequence[str] | None, chosen: Collection[str] | None) -> Steering:
        """What leaves these passes, and of them the chosen rewrites."""
        skip = frozenset() if passes is None else frozenset(PASSES) - set(passes)
        if chosen is None:
            return Steering(skip=skip)
        chosen = self.closed(chosen)
        kernels = {(k.op, k.name) for k in defaults.KERNELS if f"{k.op}/{k.name}" not in chosen}
        return Steering(frozenset(self.known.keys() - chosen), skip, frozenset(kernels))

    def again(self, passes: Sequence[str] | None, chosen: Collection[str] | None, before: Trial) -> Trial:
        """The same run once more. Raises BisectError where it has another result."""
        after = self.once(self.steering(passes, chosen))
        if (after.broken is None) != (before.broken is None):
            raise BisectError(
                f"it is not deterministic: one set of rewrites was once {before.broken or 'right'}, and once "
                f"{after.broken or 'right'}; fix its seeds, or give a larger tolerance"
            )
        return after

    def guilty_passes(self, order: Sequence[str]) -> tuple[str, ...]:
        """The smallest set of passes that breaks, with those that they require.

        A pass that is there only for what it requires is replaced by that.
        """
        left = ddmin(tuple(order), self.broken)
        while True:
            others = (
                tuple(n for n in order if n != name and (n in left or n in _closed((name,)))) for name in left
            )
            less = next((part for part in others if part and self.broken(part)), None)
            if less is None:
                return left
            left = ddmin(less, self.broken)

    def broken(self, passes: Sequence[str]) -> bool:
        """Whether all that these passes do, with those that they require, is broken."""
        return self.everything(_closed(passes)).broken is not None

    def prerequisites(self, passes: Sequence[str], atoms: Sequence[Rewrite]) -> tuple[Rewrite, ...]:
        """Rewrites without which another of them is not made: it rewrites what they made."""
        needs = []
        for atom in atoms if len(atoms) > 1 else ():
            others = {r.key for r in atoms if r is not atom}
            without = self.part(passes, others)
            if not others <= {r.key for r in without.rewrites}:
                needs.append(atom)
        return tuple(needs)

    def found(
        self,
        culprits: tuple[Rewrite, ...],
        needs: tuple[Rewrite, ...],
        passes: tuple[str, ...],
        chosen: Sequence[str],
        candidates: int,
    ) -> Found:
        """The answer, run once more to be sure of it."""
        last = self.again(passes, chosen, self.part(passes, chosen))
        assert last.broken is not None
        steering = self.steering(passes, chosen)
        return Found(culprits, needs, last.broken, candidates, self.runs, passes, steering)
