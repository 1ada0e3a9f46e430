"""Several processes save into one directory, and each loads its part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt import artifact, backend
from graphopt.errors import ArtifactError, OptionError, ReleasedError
from graphopt.manifest import MANIFEST
from graphopt.runtime.ranks import Mesh
from tests.block import block
from tests.saving import TOKENS, Mixed, run

pytestmark = pytest.mark.usefixtures("emptied")


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Be one of several processes, as far as saving and loading see it; no collective runs."""

    def become(rank: int) -> None:
        def mesh_of(world: int) -> Mesh | None:
            return None if world == 1 else Mesh("tp", world, rank, "0", "gloo")

        for module in (artifact, backend):
            monkeypatch.setattr(module, "mesh_of", mesh_of)

    return become


def saved_by(as_rank: Callable[[int], None], world: int, directory: Path) -> None:
    """Each rank's weights are its number."""
    for rank in range(world):
        as_rank(rank)
        model = graphopt.optimize(block(), shard=world, shard_plan={"q": "colwise"})
        model.q.weight.fill_(rank)
        graphopt.save(model, directory)


def test_each_process_has_its_part_of_one_directory(tmp_path: Path, as_rank: Callable[[int], None]) -> None:
    saved_by(as_rank, 2, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"rank0of2", "rank1of2"}
    for rank in range(2):
        as_rank(rank)
        model = graphopt.load(block(7), tmp_path)
        owned = backend.STORE.owners.of(model)
        assert bool((model.q.weight == rank).all()) and owned is not None
        assert owned.options.shard == 2 and owned.options.shard_plan == (("q", "colwise"),)


def test_another_number_of_processes_replaces_what_was_saved(
    tmp_path: Path, as_rank: Callable[[int], None]
) -> None:
    for world in (1, 2, 3, 1):
        if world == 1:
            graphopt.save(graphopt.optimize(block()), tmp_path)
        else:
            saved_by(as_rank, world, tmp_path)
        homes = {p.parent for p in tmp_path.rglob(MANIFEST)}
        files = {p.parent for p in tmp_path.rglob("weights-*.safetensors")}
        assert homes == files and len(homes) == world
    assert torch.equal(graphopt.load(block(7), tmp_path).q.weight, block().q.weight)


def test_a_part_of_others_is_seen_before_anything_is_changed(
    tmp_path: Path, as_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_by(as_rank, 2, tmp_path)
    model = block(7)
    with pytest.raises(ArtifactError, match="has the weights of rank 0 of 2, and this is rank 1"):
        graphopt.load(model, tmp_path / "rank0of2")
    monkeypatch.undo()
    for directory in (tmp_path, tmp_path / "rank0of2"):
        with pytest.raises(OptionError, match=r"'shard' is 2, but torch\.distributed is not initialised"):
            graphopt.load(model, directory)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), block(7).parameters(), strict=True))


def test_a_program_that_prepares_otherwise_says_so_at_the_first_call(tmp_path: Path) -> None:
    class Other(Mixed):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(nn.functional.pad(self.embed(tokens), (0, 44)), self.packed.t())

    graphopt.save(run()[0], tmp_path)
    ours = graphopt.load(Other().requires_grad_(False), tmp_path)
    with pytest.raises(
        ReleasedError, match=r"weight packed \[64, 64\] .* form \w{16} .* not held \(held: \w{16} \["
    ):
        ours(TOKENS)
