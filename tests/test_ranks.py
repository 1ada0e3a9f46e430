"""Several processes run one model over gloo: the same logits and tokens as one, and clear errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.errors import GraphoptError, OptionError, ShardError
from graphopt.options import Options
from graphopt.runtime.ranks import Mesh, Ranked, digest, lost, mesh_of
from tests.sharding.models import LAYERS
from tests.tolerances import LOGITS, SAME_PRODUCTS

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "rank_jobs.py"
KV_HEADS = {"llama": 2, "qwen3": 2, "gemma2": 2, "gpt2": 4, "bert": 4}
JOBS = (
    "logits", "caches", "compiled", "planned", "generated", "saved", "verified", "another_world",
    "other_options", "does_not_divide",
)  # fmt: skip
PATIENCE = 600  # seconds: 60 of a free core each, and four share two that others use


def environment(**more: str) -> dict[str, str]:
    """The processes find the repository, and have one thread each."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def torchrun(world: int, folder: Path, *jobs: str) -> None:
    """Run jobs on so many ranks, as a user starts them."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        str(PROGRAM), str(folder), *jobs,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]


def results(folder: Path, job: str, world: int) -> list[object]:
    """What each rank found."""
    return [json.loads((folder / f"{job}{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs of two ranks, in one start: importing is what takes the time."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, folder, *JOBS)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logits of four ranks, which are more than some families have kv heads."""
    folder = tmp_path_factory.mktemp("four")
    torchrun(4, folder, "logits")
    return folder


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", list(KV_HEADS))
def test_several_processes_give_the_logits_of_one(
    request: pytest.FixtureRequest, name: str, world: int
) -> None:
    folder = request.getfixturevalue({2: "two", 4: "four"}[world])
    for found in results(folder, "logits", world):
        assert found[name]["far"] < LOGITS  # type: ignore[index]  # a dict
        assert found[name]["same_tokens"]  # type: ignore[index]  # a dict
        assert found[name]["counts"] == [[2 * LAYERS + 1, 1]] * 2  # type: ignore[index]  # two lengths


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", list(KV_HEADS))
def test_each_process_holds_its_share(request: pytest.FixtureRequest, name: str, world: int) -> None:
    """Through `optimize`, what lies in memory; keys and values have copies where heads are few."""
    folder = request.getfixturevalue({2: "two", 4: "four"}[world])
    for found in results(folder, "logits", world):
        blocks, (whole, mine) = found[name]["blocks"], found[name]["model"]  # type: ignore[index]  # a dict
        few = blocks["keys and values"]
        copied = few * max(world // KV_HEADS[name], 1) // world
        assert blocks["held"] - copied <= (blocks["whole"] - few) / world * 1.01
        assert blocks["whole"] < whole and mine < whole * (1 / world + 0.2)
        sizes = " -> ".join(f"{size / 2**20:.1f}" for size in (whole, mine))
        assert sizes in found[name]["told"]  # type: ignore[index]  # a dict


def test_caches_keep_the_shapes_of_one_process(two: Path) -> None:
    # One gather for the logits. The keys and the values of a prompt that attention reads past the cache are
    # results as any other: gathered, too, once each a layer.
    for found in results(two, "caches", 2):
        for cache in ("static", "dynamic"):
            assert found[cache]["far"] < LOGITS  # type: ignore[index]  # a dict
            reduces, gathers = map(set, zip(*found[cache]["counts"], strict=True))  # type: ignore[index]
            assert reduces == {2 * LAYERS + 1}
            assert min(gathers) == 1 and max(gathers) <= 1 + 2 * LAYERS


def test_what_fails_on_one_rank_is_taken_back_on_all(two: Path) -> None:
    for found in results(two, "verified", 2):
        assert isinstance(found, dict) and found["far"] < LOGITS and found["judged"] > 5
        assert found["taken_back"] == ["torch_sdpa"] and found["not_verified"] == ["shard and what follows"]
        assert found["whole"] == "not judged: under `shard`, where each rank computes a part"


def test_through_torch_compile(two: Path) -> None:
    assert max(results(two, "compiled", 2)) < LOGITS  # type: ignore[type-var, operator]  # floats


def test_with_the_librarys_own_plan(two: Path) -> None:
    for found in results(two, "planned", 2):
        assert found["far"] < LOGITS  # type: ignore[index]  # a dict
        assert found["counts"] == [[2 * LAYERS + 1, 1]] * 2  # type: ignore[index]  # a dict


def test_int8_parts_are_saved_into_one_directory_and_loaded(two: Path) -> None:
    for found in results(two, "saved", 2):
        assert found["far"] < SAME_PRODUCTS  # type: ignore[index]  # a dict
        assert found["prepared"] == 0  # type: ignore[index]  # a dict


def test_a_librarys_generate_gives_the_same_tokens_on_all_ranks(two: Path) -> None:
    (alone, mine), (_, other) = results(two, "generated", 2)  # type: ignore[misc]  # pairs
    assert alone == mine == other  # type: ignore[has-type]  # lists
    assert len(alone[0]) == 10  # type: ignore[has-type]


# ------------------------------------------------------------------------------------------------ errors


def test_another_number_of_processes(two: Path) -> None:
    for told in results(two, "another_world", 2):
        assert str(told).startswith(
            "OptionError: option 'shard' is 3, but torch.distributed runs 2 processes"
        )


def test_ranks_that_would_run_other_programs(two: Path) -> None:
    for told in results(two, "other_options", 2):
        assert re.match(
            r"RankError: rank \d of 2 would run another program than the others \(plans", str(told)
        )


def test_heads_that_do_not_divide_are_an_error(two: Path) -> None:
    for told in results(two, "does_not_divide", 2):
        assert "attention has 3 query heads, which 2 ranks cannot share evenly" in str(told)
        assert "bert.encoder.layer.0.attention" in str(told)


def test_a_rank_that_dies_is_told_to_the_others(tmp_path: Path) -> None:
    """Not under torchrun, which ends the others itself."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(tmp_path), "left_alone"],
            env=environment(RANK=str(rank), WORLD_SIZE="2"), stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    codes = []
    for process in ranks:
        _, errors = process.communicate(timeout=PATIENCE)
        codes.append(process.returncode)
        assert process.returncode in (0, 3), errors[-4000:]
    assert codes[1] == 3
    found = json.loads((tmp_path / "left_alone0.json").read_text())
    assert found["told"].startswith("RankError: rank 0 of 2 waited in a collective of group")
    assert found["seconds"] < 60


def test_a_plan_is_looked_at_before_anything_is_changed() -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(OptionError, match="'shard_plan' does nothing alone; give the number of ranks"):
        graphopt.optimize(model, shard_plan={"q_proj": "colwise"})
    with pytest.raises(ShardError, match="plan: 'q_proj' is 'columns'; known are colwise"):
        graphopt.optimize(model, shard=2, shard_plan={"q_proj": "columns"})
    for plan in ("colwise", ["q_proj"], {"q_proj": 1}, [("a", "b", "c")]):
        with pytest.raises(OptionError, match=r"'shard_plan' is .*; it takes a dict, as"):
            graphopt.optimize(model, shard=2, shard_plan=plan)
    assert model._compiled_call_impl is None
    assert Options.parse({"shard": 2, "shard_plan": {"a": "b"}}).shard_plan == (("a", "b"),)


def test_without_processes() -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(
        OptionError, match=r"'shard' is 2, but torch.distributed is not initialised; start the"
    ):
        graphopt.optimize(model, shard=2)
    assert model._compiled_call_impl is None
    assert mesh_of(1) is None


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None])
def test_a_number_of_ranks_that_is_none(value: object) -> None:
    with pytest.raises(OptionError, match=r"'shard' is .*; it takes a whole number, 1 or more"):
        graphopt.optimize(torch.nn.Linear(4, 4), shard=value)


MESH = Mesh("tp", 2, 1, "0", "gloo")


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5001",
        "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation",
        "Socket Timeout",
        "NCCL communicator was aborted on rank 1",
    ],
)
def test_errors_of_lost_ranks_are_known(text: str) -> None:
    told = lost(MESH, RuntimeError(text))
    assert told is not None and text in told and "rank 1 of 2" in told and "'tp'" in told


@pytest.mark.parametrize(
    "text",
    [
        "The size of tensor a (3) must match the size of tensor b (4)",
        "the value cannot be stored in fp16",
        "Expected restored size 3",
    ],
)
def test_other_errors_are_left_alone(text: str) -> None:
    def run() -> object:
        raise RuntimeError(text)

    ranked = Ranked(run, MESH, digest("plan"))
    ranked.agreed = True
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        ranked()
    assert not isinstance(raised.value, GraphoptError)


def test_a_digest_tells_programs_apart() -> None:
    assert digest("a", 1) == digest("a", 1) != digest("a", 2)
    assert len(digest("a")) == 16
