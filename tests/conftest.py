"""What every test shares: Before / After of rules, refusals by name, modes and compiled code as they were."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from graphopt import backend
from graphopt import graph as g
from graphopt.certificates import Certificates
from graphopt.rewrite import Refusal
from graphopt.rule import Rule
from graphopt.translate import Translation
from tests.clean_start import forget
from tests.rewriting import canonical, outputs, rewritten
from tests.rule_cases import EQUATIONS
from tests.tolerances import close


@pytest.fixture(autouse=True)
def modes_are_left_as_they_were() -> Iterator[None]:
    """A test that leaves gradients off changes the meaning of those after it: it fails itself."""
    before = torch.is_grad_enabled()
    yield
    after = torch.is_grad_enabled()
    torch.set_grad_enabled(before)
    assert after == before, f"gradients were {before} before the test and are {after} after it"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tests that are marked `gpu` run where there is one, and no other test is left out."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


Program = Callable[..., object]
Rules = Sequence[Rule | Translation]


@pytest.fixture
def emptied() -> Iterator[None]:
    """No compiled code, prepared weights or reports of other tests."""
    forget()
    yield
    torch.compiler.reset()


@pytest.fixture
def fresh(emptied: None) -> Iterator[None]:
    """No compiled code, prepared weights or reports of other tests; no gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def own_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No certificates of other tests or of the user."""
    monkeypatch.setattr(backend, "CERTIFICATES", Certificates(tmp_path / "verified"))


@pytest.fixture
def assert_rewrites() -> Callable[..., None]:
    """assert_rewrites(before, after, rules=RULES, args=tensors): the rules turn one program into the other.

    Shows both graphs where they differ, then compares the numbers.
    """

    def check(before: Program, after: Program, *, rules: Rules, args: Sequence[torch.Tensor]) -> None:
        found, seen = rewritten(canonical(before, *args), rules)
        wanted = canonical(after, *args)
        if g.fingerprint(found.graph) != g.fingerprint(wanted.graph):
            misses = "\n".join(f"  {r.rule} at {r.node}: {r.reason}" for r in seen.refusals)
            pytest.fail(f"found\n{found.code}\nwanted\n{wanted.code}\nrefused\n{misses}")
        expected = before(*args)
        for want, have in zip(outputs(expected), found(*args), strict=True):
            close(have, want, args[0].dtype)

    return check


@pytest.fixture
def refusal_of() -> Callable[..., Refusal]:
    """refusal_of(rule, program, args): why the rule of that name did not apply, at its nearest miss."""

    def find(name: str, program: Program, args: Sequence[torch.Tensor], rules: Rules = EQUATIONS) -> Refusal:
        _, seen = rewritten(canonical(program, *args), rules)
        assert name not in [m.rule for m in seen.matches], f"{name} did apply"
        mine = [r for r in seen.refusals if r.rule == name]
        assert mine, (
            f"{name} came nowhere near; the refusals are of {sorted({r.rule for r in seen.refusals})}"
        )
        return max(mine, key=lambda r: r.depth)

    return find
