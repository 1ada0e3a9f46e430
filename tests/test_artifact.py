"""Saved and loaded: weights as they lie in memory, nothing prepared again."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import graphopt
from graphopt import backend, tensor_file
from graphopt.errors import ArtifactError
from graphopt.manifest import MANIFEST
from graphopt.ownership import is_stand_in
from tests.block import MERGED, agree, block, counted, example
from tests.saving import OPTIONS, TOKENS, mixed, run, state_of, weights_file

pytestmark = pytest.mark.usefixtures("emptied")


def reference(model: nn.Module) -> torch.Tensor:
    """What the program gives on weights that are not owned."""
    return torch.compile(model, backend="graphopt", options=dict(OPTIONS))(TOKENS)


# ------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loaded_model_prepares_nothing(tmp_path: Path, device: str) -> None:
    model, y = run()
    graphopt.save(model, tmp_path)
    with torch.device(device):
        other = mixed(7)
    ours = graphopt.load(other, tmp_path)
    assert ours is other and ours.head.weight is ours.embed.weight
    assert {n for n, p in ours.named_parameters() if is_stand_in(p)} == {"packed"}
    with counted() as counts:
        assert torch.equal(ours(TOKENS), y)
        agree(ours(TOKENS[:, :3]), model(TOKENS[:, :3]))
    assert counts["prepared"] == 0
    assert not any(p.requires_grad for p in ours.parameters())
    for (name, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q) or is_stand_in(p), name
    assert torch.equal(model.mean, ours.mean) and torch.equal(model.shift, ours.shift)


def test_the_file_holds_each_memory_once(tmp_path: Path) -> None:
    model, _ = run()
    graphopt.save(model, tmp_path)
    tensors = safetensors.torch.load_file(weights_file(tmp_path))  # the format's own reader
    nbytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    nbytes += 64 * (64 + 4) - model.packed.nbytes  # bytes and a scale a row
    assert nbytes <= sum(x.nbytes for x in tensors.values()) <= nbytes + 20 * 4, "and gain, cast"
    assert torch.equal(tensors["block.o.weight"], model.block.o.weight)
    assert sorted(os.listdir(tmp_path)) == sorted([MANIFEST, weights_file(tmp_path).name])
    merged = next(
        p for p in json.loads((tmp_path / MANIFEST).read_text())["prepared"] if len(p["sources"]) == 3
    )
    assert merged["sources"] == ["block.q.weight", "block.k.weight", "block.v.weight"]
    q, k, v = (model.block.get_parameter(f"{n}.weight") for n in "qkv")
    assert torch.equal(tensors[merged["value"]["block"]], torch.cat([q, k, v]))


def test_loaded_weights_change_as_others_do(tmp_path: Path) -> None:
    model, _ = run()
    graphopt.save(model, tmp_path)
    ours, twin = graphopt.load(mixed(7), tmp_path), mixed()
    ours(TOKENS)
    for changed in (ours, twin):
        changed.block.k.weight.mul_(3)
        changed.shift.add_(1)
    agree(ours(TOKENS), reference(twin))
    twin = mixed(9)
    ours.load_state_dict(twin.state_dict())
    ours.mean.copy_(twin.mean)
    agree(ours(TOKENS), reference(twin))
    graphopt.refresh(ours)
    agree(ours(TOKENS), reference(twin))


def test_saved_before_the_first_call(tmp_path: Path) -> None:
    model, expected = graphopt.optimize(mixed(), **OPTIONS), reference(mixed())
    graphopt.save(model, tmp_path)
    ours = graphopt.load(mixed(7), tmp_path)
    with counted() as counts:
        agree(ours(TOKENS), expected)
    assert counts["prepared"] >= MERGED


def test_options_come_along(tmp_path: Path) -> None:
    model = graphopt.optimize(block(), merge=False, strict=True, release=False)
    y = model(example())
    graphopt.save(model, tmp_path)
    ours = graphopt.load(block(7), tmp_path)
    owned = backend.STORE.owners.of(ours)
    assert owned == backend.STORE.owners.of(model) and owned is not None and not owned.release
    with counted() as counts:
        agree(ours(example()), y)
    assert counts["prepared"] == 0
    assert graphopt.optimize(ours, merge=False, strict=True, release=False) is ours


def test_changes_that_were_not_prepared_yet_are_saved(tmp_path: Path) -> None:
    model, _ = run()
    model.packed.data = torch.randn(64, 64)
    model.block.k.weight.data = torch.randn(20, 20)
    model.block.up.weight.zero_()
    graphopt.save(model, tmp_path)
    ours = graphopt.load(mixed(7), tmp_path)
    y = ours(TOKENS)
    agree(y, model(TOKENS))
    agree(y, ours(TOKENS))


def test_a_loaded_model_is_saved_again_equally(tmp_path: Path) -> None:
    model, y = run()
    graphopt.save(model, tmp_path / "one")
    graphopt.save(graphopt.load(mixed(7), tmp_path / "one"), tmp_path / "two")
    assert weights_file(tmp_path / "one").read_bytes() == weights_file(tmp_path / "two").read_bytes()
    assert torch.equal(graphopt.load(mixed(8), tmp_path / "two")(TOKENS), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = graphopt.optimize(block().to(dtype))
    y = model(example().to(dtype))
    graphopt.save(model, tmp_path)
    with torch.device("meta"):
        other = block(7).to(dtype)
    assert torch.equal(graphopt.load(other, tmp_path)(example().to(dtype)), y)


def test_memory_that_is_laid_out_otherwise(tmp_path: Path) -> None:
    """Parts of one flat tensor, transposed, expanded and empty weights."""

    class Odd(nn.Module):
        def __init__(self, flat: torch.Tensor) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[22:42].view(4, 5))
            self.turned = nn.Parameter(torch.randn(5, 4).t())
            self.spread, self.empty = (
                nn.Parameter(torch.ones(1, 5).expand(4, 5)),
                nn.Parameter(torch.empty(0, 5)),
            )
            self.number = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sides = (
                x @ self.one.t(),
                x @ self.two.t() @ self.turned,
                (x * self.spread.sum(0) * self.number).sum(),
            )
            return sides[0].sum() + sides[1].sum() + sides[2] + self.empty.sum()

    model, x = Odd(torch.randn(50)), torch.randn(2, 5)
    y = graphopt.optimize(model)(x)
    state = state_of(model)
    graphopt.save(model, tmp_path)
    ours = graphopt.load(Odd(torch.zeros(50)), tmp_path)
    agree(ours(x), y)
    for name, value in state_of(ours).items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_saving_again_replaces_and_a_failure_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y = run()
    graphopt.save(model, tmp_path)
    first = weights_file(tmp_path)
    model.block.o.weight.mul_(2)
    real, calls = os.replace, []

    def fail(source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2:
            raise OSError("disk full")
        real(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        graphopt.save(model, tmp_path)
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".new")] and first.exists()
    assert torch.equal(graphopt.load(mixed(7), tmp_path)(TOKENS), y)
    monkeypatch.undo()
    graphopt.save(model, tmp_path)
    assert not first.exists()
    assert torch.equal(graphopt.load(mixed(7), tmp_path)(TOKENS), model(TOKENS))


# --------------------------------------------------------------------------------------- several processes


def test_tensor_files_are_what_the_format_says(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(7, 123),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(3, dtype=torch.int8),
        "half": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False, True]),
    }
    digest = tensor_file.write(file, tensors)
    assert digest == tensor_file.write(tmp_path / "y.safetensors", copy.deepcopy(tensors))
    read = safetensors.torch.load_file(file)
    stored = tensor_file.read_header(file)
    assert list(stored) == list(tensors)
    for name, x in tensors.items():
        assert torch.equal(read[name], x)
        mine = torch.empty_like(x)
        tensor_file.read_into(file, stored[name], mine)
        assert torch.equal(mine, x)
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, theirs, metadata={"format": "pt"})
    stored = tensor_file.read_header(theirs)
    assert {n: (s.shape, s.dtype) for n, s in stored.items()} == {
        n: (x.shape, x.dtype) for n, x in tensors.items()
    }
    with pytest.raises(ArtifactError, match=r"is torch\.complex64; files hold"):
        tensor_file.write(file, {"z": torch.zeros(1, dtype=torch.complex64)})
