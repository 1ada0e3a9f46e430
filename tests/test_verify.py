"""Verified rewrites: whatever is wrong is taken back and named, the rest stays, and the result is right."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphopt import api, backend, defaults, live, ops
from graphopt.accuracy import judge
from graphopt.certificates import Certificates
from graphopt.errors import ExpectError, OptionError, StrictError
from graphopt.options import Options
from graphopt.report import Report
from graphopt.rule import T, rule
from graphopt.verification import CERTIFIED, RIGHT
from graphopt.verify import Budget
from tests.block import agree, block, example
from tests.models import zoo
from tests.tolerances import AUTOCAST, INT8
from tests.verifying import late_sdpa, more_eps, ran, wrong_kernel, wrong_rule, wrong_translation

HALF_AND_WHOLE = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("emptied", "own_certificates")


def right(name: str, case: zoo.Case, dtype: torch.dtype, results: list[object]) -> None:
    """Assert that the results of `zoo.run` are the model's, by the accuracy rule."""
    given = zoo.inputs(zoo.model(name), case)
    ours = zoo.real(results, given)
    verdict = judge(zoo.oracle(name, case), zoo.eager(name, case, dtype), ours, dtype)
    assert verdict.ok, verdict.reason


class Calls:
    """A compiled model as `zoo.run` calls it."""

    def __init__(self, name: str, dtype: torch.dtype, compiled: Callable[..., object]) -> None:
        self.config, self.compiled = zoo.model(name, dtype=dtype).config, compiled

    def __call__(self, **given: object) -> object:
        return self.compiled(**given)


# ----------------------------------------------------------------------------------------- real, small models


def wrong_sdpa(change: Callable[[Mapping[str, object]], Mapping[str, object]]) -> Callable[[], tuple]:
    return lambda: wrong_translation("torch_sdpa", change)


FAULTS = {
    "scale": ("llama", "torch_sdpa", wrong_sdpa(lambda a: {"scale": 0.5})),
    "mask": ("gpt2", "torch_sdpa", wrong_sdpa(lambda a: {"causal": False, "bias": None})),
    "k and v": ("bert", "torch_sdpa", wrong_sdpa(lambda a: {"k": a["v"], "v": a["k"]})),
    "eps": ("llama", "llama_rms_norm", lambda: wrong_rule("llama_rms_norm", replacement=more_eps)),
}


@functools.cache
def matches_when_right(name: str, dtype: torch.dtype) -> frozenset[tuple[str, str]]:
    """(rule, id) of what is applied to a model with the default rules, verified."""
    torch.compiler.reset()
    given = zoo.inputs(zoo.model(name), zoo.Case())
    outcome = ran(zoo.model(name, dtype=dtype), lambda c: c(**given, **_uncached(name)))
    assert not outcome.warnings and not outcome.culprits and not outcome.found.not_verified
    return frozenset((m.rule, m.id) for m in outcome.report.matches)


def _uncached(name: str) -> dict[str, bool]:
    return {"use_cache": False} if zoo.FAMILIES[name].caches else {}


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [*((fault, torch.float32) for fault in FAULTS), ("scale", torch.bfloat16), ("eps", torch.bfloat16)],
    ids=str,
)
def test_a_wrong_rule_is_taken_back_and_named(
    monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype
) -> None:
    name, culprit, rules = FAULTS[fault]
    model, case = zoo.model(name, dtype=dtype), zoo.Case()
    given = zoo.inputs(model, case)
    with monkeypatch.context() as patch:
        patch.setattr(defaults, "RULES", rules())
        outcome = ran(model, lambda c: c(**given, **_uncached(name)).logits)  # type: ignore[attr-defined]
    oracle, eager = zoo.oracle(name, case)["logits0"], zoo.eager(name, case, dtype)["logits0"]
    verdict = judge(oracle, eager, zoo.real(outcome.results, given)["logits0"], dtype)
    assert verdict.ok, verdict.reason
    (taken,) = outcome.found.taken_back
    assert taken.rule == culprit and taken.error > taken.limit > taken.expected
    assert ".py:" in taken.source and taken.module_path
    (warning,) = outcome.warnings
    assert f"takes back a rewrite that gives other numbers: {culprit} at {taken.module_path}" in warning
    assert "rmse" in warning and f"and {len(taken.matches) - 1} more like it" in warning
    # All that is not the culprit's, or reads what it makes, stays.
    left = {(m.rule, m.id) for m in outcome.report.matches}
    assert {rule for rule, _ in matches_when_right(name, dtype) - left} <= {culprit, *READERS[culprit]}
    assert not any(rule == culprit for rule, _ in left) and len(left) > 6


# Rules that match what another has made.
READERS = {
    "torch_sdpa": ("repeated_heads", "mask"),
    "llama_rms_norm": ("residual_rms_norm", "rms_norm_of_sum", "merge_siblings"),
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_right_stays_with_caches(name: str, cache: str) -> None:
    """Mutated inputs and symbolic lengths; two threads of state: the results are those of the model."""
    case = zoo.Case(cache=cache)
    given = zoo.inputs(zoo.model(name), case)
    outcome = ran(
        zoo.model(name),
        lambda c: zoo.run(Calls(name, torch.float32, c), given, cache),  # type: ignore[arg-type]
        strict=True,
    )
    right(name, case, torch.float32, outcome.results[0])  # type: ignore[arg-type]
    for report in backend.reports():
        found = report.verification
        assert found is not None and found.judged + found.certified > 10
        assert not found.taken_back and not found.not_verified and not found.made_up
        assert found.whole is not None and found.whole.state in (RIGHT, CERTIFIED)


def test_a_wrong_kernel_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "KERNELS", wrong_kernel("attention_sdpa", late_sdpa))
    model, x = block(), example()
    outcome = ran(model, lambda c: c(x))
    agree(outcome.results[0], model(x))  # type: ignore[arg-type]  # a tensor
    assert outcome.culprits == {"kernel attention_sdpa"}
    assert "attention_sdpa" not in outcome.report.kernels["attention"]
    assert outcome.report.counts["attention"] == 1, "the op stays"


def test_a_kernel_that_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> object:
        raise ValueError("no such tile")

    monkeypatch.setattr(defaults, "KERNELS", wrong_kernel("gated_activation_torch", broken))
    outcome = ran(block(), lambda c: c(example()))
    agree(outcome.results[0], block()(example()))  # type: ignore[arg-type]
    assert [t.reason for t in outcome.found.taken_back] == ["it fails: ValueError: no such tile"]


def test_strict_raises_and_names_the_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = wrong_translation("torch_sdpa", lambda a: {"scale": 1.0})
    monkeypatch.setattr(defaults, "RULES", rules)
    with pytest.raises(StrictError, match=r"takes back a rewrite that gives other numbers: torch_sdpa at "):
        ran(block(), lambda c: c(example()), strict=True)


def test_what_a_wrong_rewrite_made_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement that gives NaN: what comes after it is judged on the program's own values."""
    monkeypatch.setattr(defaults, "RULES", wrong_translation("torch_silu", lambda a: {"kind": "relu"}))
    two = torch.nn.Sequential(block(0), block(1))
    outcome = ran(two, lambda c: c(example()))
    agree(outcome.results[0], two(example()))  # type: ignore[arg-type]
    (taken,) = outcome.found.taken_back
    assert taken.rule == "torch_silu" and len(taken.matches) == 2, "both layers, judged once"
    assert str(taken).startswith("torch_silu at ") and " and 1 more like it: " in str(taken)
    assert not any(m.rule == "torch_silu" for m in outcome.report.matches)


# --------------------------------------------------------------------------------------- always, and budgets


def shifted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x + 0.0)


def big_is_wrong(x: Tensor) -> Tensor:
    """silu for what is below 100."""
    return torch.clamp(ops.activation(x, "silu"), max=100.0)


MINE = (rule(lambda x: x * torch.sigmoid(x), big_is_wrong, x=T("... n")),)


def test_always_sees_what_only_a_later_call_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "RULES", MINE)

    def model(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    x = torch.randn(3, 5)
    torch.compiler.reset()
    once = ran(model, lambda c: c(x), lambda c: c(x * 1e4))
    assert not once.warnings and not torch.equal(once.results[1], model(x * 1e4))  # type: ignore[arg-type]
    torch.compiler.reset()
    always = ran(model, lambda c: c(x), lambda c: c(x * 1e4), lambda c: c(x), verify="always")
    for given, result in zip((x, x * 1e4, x), always.results, strict=True):
        agree(result, model(given))  # type: ignore[arg-type]
    assert len(always.warnings) == 1 and always.culprits == {"<lambda>"}
    torch.compiler.reset()
    again = ran(model, lambda c: c(x))
    assert again.found.judged == 1, "a certificate is gone once it has failed"


def test_a_budget_that_is_used_up_is_told() -> None:
    model, x = block(), example(64)
    small = ran(Wide(), lambda c: c(torch.ones(1, 2048)), verify_mebibytes=1)
    reasons = {n.reason for n in small.found.not_verified}
    assert reasons and all("the memory budget is 1 MiB" in r for r in reasons)
    assert "not verified" in str(small.report) and not small.warnings
    assert agree(ran(model, lambda c: c(x), verify_mebibytes=64).results[0], model(x)) is None  # type: ignore[arg-type]


class Wide(torch.nn.Linear):
    """1024 x 2048: 24 MiB in fp32 and fp64."""

    def __init__(self) -> None:
        super().__init__(2048, 1024)


def test_time_that_is_used_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "Budget", lambda seconds, size: Budget(0.0, size))
    found = ran(block(), lambda c: c(example())).found
    assert found.judged == 0 and len(found.not_verified) > 5
    assert {n.reason for n in found.not_verified} == {"the time budget of 0 s is used up"}


def test_options_of_verification_need_it() -> None:
    assert Options.parse({"verify": "first", "verify_seconds": 5}).verify_seconds == 5
    for name in ("verify_seconds", "verify_mebibytes"):
        with pytest.raises(OptionError, match=f"'{name}' does nothing alone; give verify='first'"):
            Options.parse({name: 5})
    with pytest.raises(OptionError, match="did you mean 'first'"):
        Options.parse({"verify": "frst"})


# -------------------------------------------------------------------------------------------- certificates


def account(outcome_of: Callable[[], object]) -> tuple[int, int]:
    torch.compiler.reset()
    outcome_of()
    found = backend.reports()[-1].verification
    assert found is not None
    return found.judged, found.certified


def new_process(monkeypatch: pytest.MonkeyPatch) -> Certificates:
    """Only the files are left, as after a start."""
    certificates = Certificates(backend.CERTIFICATES.folder)
    monkeypatch.setattr(backend, "CERTIFICATES", certificates)
    return certificates


def test_a_second_start_verifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    judged, none = account(lambda: ran(block(), lambda c: c(example())))
    assert judged > 5 and none == 0
    new_process(monkeypatch)
    assert account(lambda: ran(block(), lambda c: c(example()))) == (0, judged)
    assert account(lambda: ran(block(seed=3), lambda c: c(example()))) == (0, judged), "other weights"


@pytest.mark.parametrize("batch", [1])
def test_another_shape_class_is_verified_anew(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    model = torch.nn.SiLU()

    def run(x: Tensor) -> Callable[[], object]:
        return lambda: ran(model, lambda c: c(x))

    both, _ = account(run(torch.randn(3, 5)))
    assert both == 2, "the rule and its kernel"
    assert account(run(torch.randn(3, 7))) == (0, 2), "another size of the same class"
    assert account(run(torch.randn(batch, 7))) == (2, 0)
    assert account(run(torch.randn(0, 7))) == (2, 0)
    assert account(run(torch.randn(3, 7, dtype=torch.float64))) == (2, 0)


def test_a_changed_rule_is_verified_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def replaced(x: Tensor) -> Tensor:
        return ops.activation(x, "silu")

    def replaced_otherwise(x: Tensor) -> Tensor:
        return ops.activation(x, kind="silu")  # the same graph, of another source

    def run() -> object:
        return ran(model, lambda c: c(torch.ones(3, 5)))

    counted = []
    for replacement in (replaced, replaced, replaced_otherwise):
        mine = rule(model, replacement, x=T("... n"))
        monkeypatch.setattr(defaults, "RULES", (mine,))
        counted.append(account(run))
    assert counted == [(2, 0), (0, 2), (1, 1)]  # the kernel is the same


@pytest.mark.parametrize("text", ["", "{", '{"fields": {"key": "x"}, "sum": "0"}', "[1]", "\x00\xff"])
def test_a_damaged_certificate_is_a_warning_and_verified_anew(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    judged, _ = account(lambda: ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5))))
    certificates = new_process(monkeypatch)
    assert certificates.folder is not None
    for path in certificates.folder.glob("*.json"):
        path.write_text(text)
    torch.compiler.reset()
    outcome = ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5)))
    assert (outcome.found.judged, outcome.found.certified) == (judged, 0)
    assert len([w for w in outcome.warnings if "is damaged; its rewrite is verified again" in w]) == judged
    new_process(monkeypatch)
    assert account(lambda: ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5)))) == (0, judged)


def test_a_folder_that_cannot_be_written_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(backend, "CERTIFICATES", Certificates(tmp_path / "file" / "verified"))
    assert account(lambda: ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5)))) == (2, 0)
    assert account(lambda: ran(torch.nn.SiLU(), lambda c: c(torch.ones(3, 5)))) == (0, 2), "in this process"


def test_threads_share_certificates(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    shared = Certificates(tmp_path)

    def work(i: int) -> bool:
        for n in range(20):
            shared.keep(f"k{n}", {"rule": f"r{n}", "error": float(i)})
            known = Certificates(tmp_path).get(f"k{n}")  # from the file, while others write it
            assert known is not None and known["rule"] == f"r{n}"
            shared.revoke(f"k{100 + n}")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(list(tmp_path.glob("*.json"))) == 20


# -------------------------------------------------------------------------------------- models and weights


class Feed(torch.nn.Module):
    """Two linears that are worth 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.nn.functional.silu(self.one(x)))


def test_an_optimized_model_with_int8_weights() -> None:
    """The first graph is verified before weights are released, a later one on made-up weights; both said."""
    torch.manual_seed(0)
    model = Feed().eval()
    x = torch.randn(3, 64)
    expected = model(x).detach()
    ours = api.optimize(model, quantize="int8", verify="first", strict=True)
    assert (ours(x) - expected).abs().max() < INT8
    first = backend.reports()[-1].verification
    assert first is not None and first.judged >= 4 and not first.taken_back and not first.made_up
    assert ["lossy" in n.reason for n in first.not_verified] == [True]
    agree(ours(x[:1]), ours(x)[:1])
    later = backend.reports()[-1].verification
    assert later is not None and later is not first and not later.taken_back
    assert later.judged > 0 and set(later.made_up) == {"one.weight", "two.weight"}


def test_weights_changed_between_calls_are_seen() -> None:
    model = block()
    x = example()

    def change(c: Callable[..., object]) -> object:
        model.q.weight.mul_(2)
        return c(x)

    outcome = ran(model, lambda c: c(x), change, verify="always", strict=True)
    agree(outcome.results[1], model(x))  # type: ignore[arg-type]


def test_a_program_called_under_autocast_is_verified_without() -> None:
    model, x = block(), example()
    with torch.autocast("cpu", torch.bfloat16):
        outcome = ran(model, lambda c: c(x), strict=True)
        expected = model(x)
    torch.testing.assert_close(outcome.results[0], expected, **AUTOCAST)
    assert outcome.found.judged > 5


def test_random_numbers_stay_the_programs_own() -> None:
    def model(x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return torch.nn.functional.silu(x + noise) + torch.randn_like(x)

    torch.manual_seed(0)
    off = ran(model, lambda c: c(torch.ones(2, 3)), verify="off")
    torch.compiler.reset()
    torch.manual_seed(0)
    on = ran(model, lambda c: c(torch.ones(2, 3)))
    assert torch.equal(on.results[0], off.results[0]) and on.found.judged == 2  # type: ignore[arg-type]


def test_off_costs_nothing_and_says_nothing() -> None:
    outcome = ran(block(), lambda c: c(example()), verify="off")
    assert outcome.report.verification is None and "verified" not in str(outcome.report)


# ------------------------------------------------------------------------------------------------ the report


def test_the_report_keeps_its_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "RULES", wrong_translation("torch_silu", lambda a: {"kind": "relu"}))
    report = ran(block(), lambda c: c(example())).report
    for copy in (Report.from_json(report.to_json()), pickle.loads(pickle.dumps(report))):
        assert copy.verification == report.verification and copy == report
    assert json.loads(report.to_json())["verification"]["taken_back"][0]["rule"] == "torch_silu"
    text = str(report)
    assert "verified " in text and "taken back" in text and "torch_silu at " in text
    assert dataclasses.asdict(report)["verification"]["mode"] == "first"


def test_blocks_that_differ_in_a_number_are_two_rewrites() -> None:
    """What is judged once is equal, scalars included."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.LayerNorm(8, eps=1e-3), torch.nn.LayerNorm(8, eps=1e-5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * 2)

    found = ran(Two().eval(), lambda c: c(torch.randn(2, 3, 8))).found
    assert (found.judged, found.applied) == (4, 4)
    torch.compiler.reset()
    alike = torch.nn.Sequential(*(torch.nn.LayerNorm(8, eps=1e-4) for _ in range(2))).eval()
    found = ran(alike, lambda c: c(torch.randn(2, 3, 8))).found
    assert (found.judged, found.applied) == (2, 4)


def test_less_than_expected_after_verification_is_an_error_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, rules = FAULTS["scale"]
    model = zoo.model("llama")
    given = zoo.inputs(model, zoo.Case())
    monkeypatch.setattr(defaults, "RULES", rules())
    options = {"verify": "first", "expect": {"attention": 2}}
    compiled = torch.compile(model, backend="graphopt", options=options)
    for _ in range(2):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the rule was taken back
            with pytest.raises(ExpectError, match="attention: 0 of 2"):
                compiled(**given, use_cache=False)
