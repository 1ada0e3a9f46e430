"""The README: its examples run, its commands work, and its tables say what the benchmarks' results say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from bench import report as tables
from bench.record import RESULTS
from graphopt import backend
from graphopt.certificates import Certificates
from graphopt.tools import cli
from graphopt.tools.explain import stages

TEXT = tables.README.read_text()
WIDTH = 120
# Without what `fill` writes. A row of a table cannot be broken.
PROSE = re.sub(r"<!-- table: .*?<!-- end -->", "", TEXT, flags=re.DOTALL)
# A path from the root of a machine, of a home or of a drive; not a part of a longer word or of an address.
MACHINE_PATH = re.compile(r"(?<![\w./:])(?:/\w[\w.-]*/?|~/\w|[A-Z]:\\\w)")


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What the Python blocks define, run one after the other as a reader would; certificates go elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "CERTIFICATES", Certificates(tmp_path_factory.mktemp("verified")))
        yield run_blocks()


def run_blocks() -> dict[str, object]:
    """The names that the Python blocks define."""
    torch.manual_seed(0)
    torch.compiler.reset()
    defined: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks("python"), 1):
        place = f"README.md, example {number}"
        # What runs nothing, or without gradients; an optimized model has none.
        harmless = ("torch.no_grad()", "explain", "bisect", "graphopt.load")
        assert any(word in block for word in harmless), f"{place} wants gradients"
        exec(compile(block, place, "exec"), defined)
    return defined


def test_every_example_runs(names: dict[str, object]) -> None:
    assert len(blocks("python")) >= 7
    assert names["logits"].shape == (1, 9, 100)  # type: ignore[attr-defined]
    assert names["tokens"].shape == (1, 14)  # type: ignore[attr-defined]
    assert names["attentions"] == 2


def test_rewrites_are_verified_and_taken_back(names: dict[str, object]) -> None:
    account = names["account"]
    assert account.judged > 10 and not account.taken_back and not account.not_verified  # type: ignore[attr-defined]
    assert account.whole.state == "right"  # type: ignore[attr-defined]  # known to be there
    torch.testing.assert_close(names["same"], names["logits_checked"])


def test_stages_of_a_pipeline_agree(names: dict[str, object]) -> None:
    torch.testing.assert_close(names["a"], names["b"])
    assert names["difference"].changed  # type: ignore[attr-defined]


def test_a_rule_of_ones_own_matches(names: dict[str, object]) -> None:
    assert names["report"].counts == {"activation": 1}  # type: ignore[attr-defined]
    x = torch.randn(3, 5)
    torch.testing.assert_close(names["found"](x), torch.nn.functional.silu(x))  # type: ignore[operator]


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line.startswith("graphopt")]
)
def test_commands_work(line: str) -> None:
    result = CliRunner().invoke(cli.app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output


def test_make_targets_exist() -> None:
    makefile = (tables.README.parent / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make (\w+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "check", "bench"} <= named
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named)


def test_tables_are_what_the_results_say() -> None:
    texts = [page.read_text() for page in tables.PAGES]
    for text in texts:
        assert tables.fill(text) == text, "run python -m bench.report"
    assert set(tables.TABLES) == set(re.findall(r"<!-- table: (\w+) -->", "".join(texts)))


def test_a_changed_number_is_seen() -> None:
    assert tables.fill(TEXT.replace("x |", "9x |")) == TEXT


def test_results_are_small_and_name_the_machine() -> None:
    found = list(RESULTS.glob("*.json"))
    assert found
    for path in found:
        limit = 150_000 if path.name == "zoo.json" else 10_000  # half a kB for each of 300 types
        assert path.stat().st_size < limit
        assert '"processor"' in path.read_text()


def test_the_road_names_the_default_passes() -> None:
    road = TEXT.split("## The road", 1)[1].split("```")[1]
    positions = [road.index(stage) for stage in stages()[1:]]
    assert positions == sorted(positions)


def test_lines_are_short_but_for_tables() -> None:
    long = [line for line in PROSE.splitlines() if len(line) > WIDTH and not line.startswith("|")]
    assert not long, long


@pytest.mark.parametrize("path", ["/home/me/x", "see /opt/a.py", "`/root/a`", "C:\\Users\\me", "~/models/x"])
def test_a_machines_path_is_seen(path: str) -> None:
    assert MACHINE_PATH.search(path)


@pytest.mark.parametrize("text", ["lossless/lossy", "https://a.org/b/c", "src/api.py", "a / b", "~2 ms"])
def test_what_is_no_machines_path_is_not(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_prose_names_no_path_of_a_machine() -> None:
    assert not MACHINE_PATH.findall(TEXT)
