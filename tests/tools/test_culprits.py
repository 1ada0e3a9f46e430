"""graphopt.tools.ddmin and .culprits: the search for what breaks, on made-up runs; bounded, pairs too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import pytest

from graphopt import defaults
from graphopt.errors import BisectError
from graphopt.lowering.select import REFERENCE
from graphopt.observe import KernelChosen
from graphopt.steering import Steering
from graphopt.tools.culprits import PASSES, Found, Recorder, Rewrite, Trial, find
from graphopt.tools.ddmin import ddmin

# ----------------------------------------------------------------------------------------- delta debugging


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_small_set_is_found_exactly_in_bounded_tries(size: int) -> None:
    units = tuple(range(9))
    for culprits in itertools.combinations(units, size):
        asked: list[tuple[int, ...]] = []

        def breaks(part: tuple[int, ...], asked: list = asked, culprits: tuple[int, ...] = culprits) -> bool:
            asked.append(part)
            return set(culprits) <= set(part)

        assert ddmin(units, breaks) == culprits
        assert len(asked) == len(set(asked)) <= 9**2 + 3 * 9


@pytest.mark.parametrize("culprit", [0, 13, 63])
def test_one_of_many_takes_two_log_n_tries(culprit: int) -> None:
    tries = 0

    def breaks(part: tuple[int, ...]) -> bool:
        nonlocal tries
        tries += 1
        return culprit in part

    assert ddmin(tuple(range(64)), breaks) == (culprit,)
    assert tries <= 12


def test_one_unit_is_not_asked_for() -> None:
    assert ddmin(("a",), lambda part: pytest.fail("known to break")) == ("a",)


# ------------------------------------------------------------------------------------- made-up compilations

LAYERS, RULES = 16, 7
KERNEL, OTHER = (f"{k.op}/{k.name}" for k in defaults.KERNELS[:2])


class Made:
    """A compilation of 16 layers with 7 rules each, merge, and two kernels, that breaks as it is told."""

    def __init__(
        self, broken: Callable[[Collection[str]], bool], needs: dict[str, str] | None = None
    ) -> None:
        self.broken = broken
        self.needs = needs or {}  # match -> the match whose result it rewrites
        self.runs: list[Steering] = []

    def everything(self) -> list[Rewrite]:
        """What is done where nothing is left out."""
        places = [(f"layers.{i}.part", f"rule{r}") for i in range(LAYERS) for r in range(RULES)]
        found = [Rewrite("recognise", rule, f"{rule}@{path}", path) for path, rule in places]
        found += [
            Rewrite("merge", "merge_siblings", f"merge_siblings@layers.{i}", f"layers.{i}")
            for i in range(LAYERS)
        ]
        return [*found, Rewrite("lower", KERNEL), Rewrite("lower", OTHER)]

    def __call__(self, steering: Steering) -> Trial:
        self.runs.append(steering)
        passes = [
            name for name in ("canonicalize", "recognise", "merge", "lower") if name not in steering.skip
        ]
        applied: dict[str, Rewrite] = {}
        for r in self.everything():
            denied = r.match in steering.deny or tuple(r.key.split("/")) in steering.kernels
            if r.pass_name in passes and not denied and self.needs.get(r.key, r.key) in {*applied, r.key}:
                applied[r.key] = r
        why = "wrong" if self.broken({*applied, *passes}) else None
        return Trial(why, tuple(applied.values()), tuple(passes))


def found(made: Made, most: int) -> Found:
    answer = find(made, most)
    assert answer is not None and answer.runs == len(made.runs)
    return answer


def keys(rewrites: Collection[Rewrite]) -> list[str]:
    return [r.key for r in rewrites]


def test_one_match_is_found_in_few_runs() -> None:
    answer = found(Made(lambda done: "rule3@layers.11.part" in done), 24)
    assert keys(answer.culprits) == ["rule3@layers.11.part"] and not answer.needs
    assert answer.broken == "wrong" and answer.candidates == LAYERS * RULES + LAYERS + 2
    assert "rule3@layers.11.part" not in answer.steering.deny
    assert answer.steering.skip >= {"merge", "lower"}


def test_two_rules_of_one_layer_that_are_wrong_only_together() -> None:
    pair = {"rule1@layers.9.part", "rule6@layers.9.part"}
    answer = found(Made(lambda done: pair <= set(done)), 60)
    assert set(keys(answer.culprits)) == pair and not answer.needs


def test_two_layers_and_two_passes_together() -> None:
    pair = {"rule4@layers.2.part", "merge_siblings@layers.13"}
    answer = found(Made(lambda done: pair <= set(done)), 80)
    assert set(keys(answer.culprits)) == pair


def test_a_rule_that_is_wrong_in_each_layer_is_found_in_one() -> None:
    made = Made(lambda done: any(name.startswith("rule5@") for name in done))
    assert keys(found(made, 30).culprits) == ["rule5@layers.0.part"]


def test_what_a_culprit_rewrites_is_needed_and_innocent() -> None:
    made = Made(lambda done: "rule2@layers.5.part" in done, {"rule2@layers.5.part": "rule0@layers.5.part"})
    answer = found(made, 60)
    assert keys(answer.culprits) == ["rule2@layers.5.part"]
    assert keys(answer.needs) == ["rule0@layers.5.part"]


def test_a_kernel_is_found_with_the_match_that_it_serves() -> None:
    made = Made(lambda done: KERNEL in done, {KERNEL: "rule0@layers.3.part"})
    answer = found(made, 60)
    assert keys(answer.culprits) == [KERNEL] and keys(answer.needs) == ["rule0@layers.3.part"]
    allowed = {(k.op, k.name) for k in defaults.KERNELS} - answer.steering.kernels
    assert allowed == {tuple(KERNEL.split("/"))}


@pytest.mark.parametrize("name", ["canonicalize", "recognise", "merge", "lower"])
def test_a_pass_whose_matches_are_innocent_is_named_as_a_whole(name: str) -> None:
    answer = found(Made(lambda done: name in done), 15)
    assert answer.culprits == (Rewrite(name),)


def test_nothing_is_broken() -> None:
    made = Made(lambda done: False)
    assert find(made) is None and len(made.runs) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Made(lambda done: True), "broken without any rewrite, too: wrong; the cause is the capture"),
        (lambda: lambda steering: Trial("no file"), r"no pass ran \(no file\): nothing was compiled with"),
        (lambda: lambda steering: Trial(None, (), ("shard",)), "pass shard cannot be left out"),
    ],
)
def test_where_there_is_no_answer_the_reason_is(make: Callable, message: str) -> None:
    run = make()
    if "shard" in message:
        run = lambda steering: Trial("wrong", (), ("shard",))  # broken, with a pass of ranks
    with pytest.raises(BisectError, match=message):
        find(run)


@pytest.mark.parametrize("odd", [2, 4])
def test_a_run_that_is_not_deterministic_is_said(odd: int) -> None:
    made = Made(lambda done: ("rule1@layers.0.part" in done) != (len(made.runs) == odd))
    with pytest.raises(BisectError, match=r"not deterministic: one set of rewrites was once (wrong|right)"):
        find(made)


def test_an_answer_that_does_not_come_again_is_said() -> None:
    """Whatever is run a second time is right then, but for the whole."""
    seen: list[frozenset[str]] = []

    def broken(done: Collection[str]) -> bool:
        seen.append(frozenset(done))
        return "rule1@layers.0.part" in done and (len(done) > 100 or seen.count(seen[-1]) == 1)

    with pytest.raises(BisectError, match="was once wrong, and once right; fix its seeds"):
        find(Made(broken))


def test_too_many_runs_are_an_error() -> None:
    with pytest.raises(BisectError, match="no answer after 6 runs; allow more"):
        find(Made(lambda done: "rule3@layers.11.part" in done), 6)


def test_matches_that_a_denial_uncovers_are_denied_too() -> None:
    """Without rule0, a smaller rule matches in its place: it must not be taken for nothing."""

    class Uncovering(Made):
        def __call__(self, steering: Steering) -> Trial:
            trial = super().__call__(steering)
            small = Rewrite("recognise", "small", "small@layers.1.part", "layers.1.part")
            taken = "recognise" in steering.skip or small.match in steering.deny
            if taken or "rule0@layers.1.part" in keys(trial.rewrites):
                return trial
            return Trial("wrong", (*trial.rewrites, small), trial.passes)

    made = Uncovering(lambda done: "rule3@layers.1.part" in done)
    assert keys(found(made, 40).culprits) == ["rule3@layers.1.part"]


def test_every_pass_of_one_process_can_be_left_out() -> None:
    assert [p.name for p in defaults.PIPELINE] == [n for n in PASSES if n not in ("quantize", "fuse")]


def test_references_are_no_rewrites() -> None:
    recorder = Recorder()
    recorder.on_event(KernelChosen("a", "rope", REFERENCE, ()))
    assert not recorder.rewrites
