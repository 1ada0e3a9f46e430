"""A compiled graph that can be built again without some of its rewrites: those that fail when they are run
(`verify`), and those that the user takes back (`report.revert`). If it fails as a whole, the original runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.autocast import within
from graphopt.capture import Captured
from graphopt.certificates import Certificates, key_of_graph
from graphopt.defaults import context, pipeline
from graphopt.errors import GraphoptError, RevertError, StrictError
from graphopt.expect import check_expected
from graphopt.ledger import Ledger
from graphopt.observe import Observer, Warned, emit
from graphopt.options import Options
from graphopt.passes.shard import HELD, PLAN_HASH
from graphopt.report import Link, Report
from graphopt.runtime.ranks import Mesh, Ranked, digest, gathered
from graphopt.steering import Steering
from graphopt.verification import NOT_JUDGED, WRONG, NotVerified, TakenBack, Verification, Whole
from graphopt.verify import Budget, Outcome, verify
from graphopt.weights import Prepared, WeightStore, prepared_weights
from graphopt.whole import Beside, OriginalFails, verify_whole

log = logging.getLogger(__name__)

ROUNDS = 8  # builds for one call; each denies what failed in the last: more than two are already odd
LOSSY = "int8_linear"  # its rule: that an int8 weight is another number is what was asked for


@dataclass(frozen=True)
class Built:
    """A program, built.

    Attributes:
        run: takes values in placeholder order.
        reads: which arguments it reads as they are; the others it reads prepared.
        moves: which arguments it reads in another layout than their own.
        plans: the hashes of what it prepares.
        ledger: what its rewrites did, until they are verified.
        key: that of its certificate as a whole; empty where nothing is verified.
    """

    run: Callable[..., object]
    reads: tuple[int, ...]
    moves: frozenset[int]
    plans: frozenset[str]
    ledger: Ledger | None
    key: str


@dataclass(eq=False)
class Live:
    """One graph of the backend: what it takes to build it, and the program that it is now.

    It holds no weight. Raises, when made, what the pipeline raises.

    Attributes:
        parameters: which of the program's arguments are parameters.
        steering: what is left out while a fault is looked for.
        report: that of the program as it is; the same object through all builds.
        deny: the ids of the matches that are not applied.
        waiting: whether something is to be done before the next run.
    """

    captured: Captured
    options: Options
    device: torch.device
    mesh: Mesh | None
    store: WeightStore
    certificates: Certificates
    observers: Sequence[Observer]
    parameters: frozenset[int]
    steering: Steering = field(default_factory=Steering)
    deny: frozenset[str] = frozenset()
    report: Report = field(init=False)
    built: Built = field(init=False)
    waiting: bool = field(init=False)
    lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _before: tuple[Built, frozenset[str], Mapping[str, object]] | None = field(default=None, init=False)
    _unjudged: Built | None = field(default=None, init=False)  # whose first call was an error in eager, too

    def __post_init__(self) -> None:
        self.built, self.report = self.build(self.deny)
        self.waiting = self.verifies
        self.report.link = Link(find=weakref.ref(self))

    @property
    def verifies(self) -> bool:
        """Whether rewrites are to be judged by running them."""
        return self.options.verify != "off"

    @property
    def strict(self) -> bool:
        """Whether to raise instead of falling back: a rank that does would leave the others waiting."""
        return self.options.strict or self.mesh is not None

    @property
    def wrong(self) -> bool:
        """Whether the program as it is gives other numbers than the original, which is to run instead."""
        found = self.report.verification
        return found is not None and found.whole is not None and found.whole.state == WRONG

    # -------------------------------------------------------------------------------------------- building

    def build(self, deny: frozenset[str]) -> tuple[Built, Report]:
        """The program without what is denied, and its report."""
        ctx = context(self.options, device=self.device, store=self.store, observers=self.observers)
        ctx.mesh, ctx.deny = self.mesh, deny
        ctx.ledger = Ledger() if self.verifies else None
        ctx.replay = ctx.replay and self.mesh is None  # a rank that replays alone would hang the others
        with within(None):  # what is run and traced on the way has its casts in the graph
            road = pipeline(self.options, device=self.device, rank=self.mesh.rank if self.mesh else 0)
            road, steered = self.steering.steer(road, ctx)
            program, report = road.run(self.captured, steered)
        gm = program.gm
        run = program.runnable(gm.forward)
        if self.mesh is not None:
            plan = digest(gm.meta[PLAN_HASH], self.options, sorted(deny))
            run = Ranked(run, self.mesh, plan, gm.meta[HELD])
        plans = [plan for part in gm.children() if isinstance(part, Prepared) for plan in part.plans]
        moves = {i for plan in plans for i in plan.moves()}
        key = ""
        if ctx.ledger is not None:
            functions = {f for rewrite in ctx.ledger.rewrites for f in rewrite.functions}
            key = key_of_graph(self.captured.gm.graph, gm.graph, functions)
        hashes = frozenset(plan.hash for plan in plans)
        return Built(run, self._reads(gm), frozenset(moves), hashes, ctx.ledger, key), report

    def _reads(self, gm: fx.GraphModule) -> tuple[int, ...]:
        """Which parameters a program reads as they are."""
        return tuple(
            i
            for i, node in enumerate(g.placeholders(gm.graph))
            if i in self.parameters and any(user.target is not prepared_weights for user in node.users)
        )

    def rebuild(self, deny: frozenset[str]) -> None:
        """Build again; what would need a guard that torch did not make for the first program fails."""
        with torch_private.no_new_guards(self.captured.mode):
            self.built, report = self.build(deny)
        self.deny = deny
        found = self.report.verification
        report.verification = dataclasses.replace(found, whole=None) if found is not None else None
        vars(self.report).update(report.__getstate__())

    # ------------------------------------------------------------------------------------------- verifying

    def catch_up(
        self, args: Sequence[object], original: Callable[..., object], look: Callable[[], None]
    ) -> None:
        """Verify where that is asked for, and build again without what failed; nothing is written to `args`.

        Args:
            original: the program that was captured.
            look: called when the program is what is to run, before any other thread may pass.

        Raises:
            StrictError: under `strict`, if a rewrite or the whole failed.
            ExpectError: what is left is less than was expected; at every call.
            GraphoptError: no program was left that passes.
        """
        with self.lock:
            if self.waiting and self.verifies:
                start = time.perf_counter()
                if self.built.ledger is not None:
                    self._verify(args, start)
                self._verify_whole(args, original, start)
            if self.verifies and not self.steering.takes:
                check_expected(self.report, self.options.expect)  # after what was taken back
            look()
            always = self.options.verify == "always" and not self.wrong
            self.waiting = always or self._unjudged is self.built

    def _verify(self, args: Sequence[object], start: float) -> None:
        judged = set[str]()
        taken: list[TakenBack] = []
        for _ in range(ROUNDS):
            found = self._judge(args)
            judged |= found.passed.keys() | found.failed.keys()
            everyones = gathered(self.mesh, list(found.failed.values()), TakenBack.read)
            failed = list({t.matches: t for t in reversed(everyones)}.values())
            taken += failed
            self._tell(found, judged, taken, start, args)
            if not failed:
                break
            if self.options.strict:
                raise StrictError(_says(failed))
            self.rebuild(self.deny.union(*(t.matches for t in failed)))
        else:
            raise GraphoptError(f"after {ROUNDS} builds rewrites still fail: {_says(taken)}")
        if self.options.verify == "first":
            self.built = dataclasses.replace(self.built, ledger=None)
        if taken:
            message = _says(taken)
            self.report.warnings = (*self.report.warnings, message)
            emit(self.observers, Warned(message))
            warnings.warn(message, stacklevel=6)

    def _judge(self, args: Sequence[object]) -> Outcome:
        assert self.built.ledger is not None
        every = self.options.verify == "always"
        with within(None):
            return verify(self.built.ledger, args, self.certificates, self._budget(), every=every)

    def _budget(self) -> Budget:
        return Budget(float(self.options.verify_seconds), self.options.verify_mebibytes << 20)

    def _tell(
        self,
        found: Outcome,
        judged: set[str],
        taken: Sequence[TakenBack],
        start: float,
        args: Sequence[object],
    ) -> None:
        """Bring the report's account up to date."""
        assert self.built.ledger is not None
        before = self.report.verification or Verification(self.options.verify)
        left = list(found.left.values())
        if self.built.ledger.closed:
            left.append(NotVerified("shard and what follows", "", (), self.built.ledger.closed))
        elif any(m.rule == LOSSY for m in self.report.matches):
            ids = tuple(m.id for m in self.report.matches if m.rule == LOSSY)
            reason = "lossy, as asked for; its linears' kernels are judged, against their op's reference"
            left.append(NotVerified(LOSSY, "", ids, reason))
        inputs = g.placeholders(self.captured.gm.graph)
        known = {t.matches for t in before.taken_back}
        self.report.verification = Verification(
            mode=self.options.verify,
            judged=len(judged),
            certified=len(found.certified.keys() - judged),
            applied=sum(found.passed.values()) + sum(found.certified.values()),
            taken_back=(*before.taken_back, *(t for t in taken if t.matches not in known)),
            not_verified=tuple(left),
            made_up=tuple(".".join(g.weight_names(inputs[i])[:1]) for i in sorted(found.made_up)),
            seconds=before.seconds + time.perf_counter() - start,
        )

    def _verify_whole(self, args: Sequence[object], original: Callable[..., object], start: float) -> None:
        """Judge the program as it is against the original, once, or at each call."""
        before = self.report.verification or Verification(self.options.verify)
        every = self.options.verify == "always"
        if before.whole is not None and self._unjudged is not self.built and not every:
            return
        self._unjudged, began = None, time.perf_counter()
        whole = self._whole(args, original, start + self._budget().seconds)
        seconds = before.seconds + time.perf_counter() - began
        self.report.verification = dataclasses.replace(before, whole=whole, seconds=seconds)
        if not self.wrong:
            return
        message = whole.sentence()
        if self.options.strict:
            self.report.verification = dataclasses.replace(self.report.verification, whole=None)
            raise StrictError(message)
        self.report.fallback = message
        self.store.drop(self.built.plans)  # the original reads none of them
        message = f"graphopt runs the original program: {message}"
        emit(self.observers, Warned(message))
        warnings.warn(message, stacklevel=6)

    def _whole(self, args: Sequence[object], original: Callable[..., object], until: float) -> Whole:
        if self.mesh is not None:
            return Whole(NOT_JUDGED, reason="under `shard`, where each rank computes a part")
        if any(m.rule == LOSSY for m in self.report.matches):
            return Whole(NOT_JUDGED, reason="it is lossy, as asked for")
        trusted = Certificates() if self.options.verify == "always" else self.certificates
        prepared = self.report.weights_prepared_bytes if self.store.owners else 0
        beside = Beside(self.captured, original, self.built.run, prepared)
        try:
            with self.store.keeping():
                whole = verify_whole(beside, args, trusted, self.built.key, self._budget(), until)
        except OriginalFails as error:
            self._unjudged = self.built
            return Whole(NOT_JUDGED, reason=f"the original fails: {error}")
        if whole.state == WRONG:
            self.certificates.revoke(self.built.key)
        return whole

    # ---------------------------------------------------------------------------------------- taking back

    def revert(self, identity: str) -> None:
        """See `Report.revert`."""
        with self.lock:
            known = [m.id for m in self.report.matches]
            if identity not in known:
                close = difflib.get_close_matches(identity, known, n=1, cutoff=0.3)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                gone = "was taken back already" if identity in self.deny else "was not applied"
                raise RevertError(f"match {identity!r} {gone} in this program{hint}")
            before = self.built, self.deny, self.report.__getstate__()
            try:
                self.rebuild(self.deny | {identity})
            except Exception as error:
                raise RevertError(f"the program cannot be built without {identity!r}: {error}") from error
            if any(m.id == identity for m in self.report.matches):
                self._return_to(before)
                raise RevertError(f"match {identity!r} cannot be denied: its pass applies it all the same")
            self._before = self._before or before
            self.waiting = True

    def settle(self) -> None:
        """The program as it is has run: what only the one before it had prepared may go."""
        with self.lock:
            if self._unjudged is self.built:  # it runs where the captured program does not
                self._unjudged, self.waiting = None, self.options.verify == "always"
            if self._before is not None:
                self.store.drop(self._before[0].plans - self.built.plans)
                self._before = None

    def restore(self) -> bool:
        """What was taken back cannot run: return to the program before, if there is one."""
        with self.lock:
            if self._before is None:
                return False
            self._return_to(self._before)
            self._before = None
            self.waiting = self.options.verify == "always"
            return True

    def _return_to(self, before: tuple[Built, frozenset[str], Mapping[str, object]]) -> None:
        self.built, self.deny, fields = before
        vars(self.report).update(fields)


def _says(taken: Sequence[TakenBack]) -> str:
    """One sentence for what failed."""
    what = "a rewrite that gives" if len(taken) == 1 else f"{len(taken)} rewrites that give"
    return f"graphopt takes back {what} other numbers: {'; '.join(map(str, taken))}"
