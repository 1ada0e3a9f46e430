"""Damaged directories and other models: each is named, and nothing is changed by an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend
from graphopt.errors import ArtifactError, OptionError, WeightError
from graphopt.manifest import MANIFEST
from tests.block import block
from tests.saving import TOKENS, Mixed, mixed, run, state_of, weights_file
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("emptied")


def changed_manifest(directory: Path, change: Callable[[dict], object]) -> None:
    """Edit a manifest."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def _cut(directory: Path) -> None:
    file = weights_file(directory)
    file.write_bytes(file.read_bytes()[:-1])


def _cut_in_header(directory: Path) -> None:
    file = weights_file(directory)
    file.write_bytes(file.read_bytes()[:40])


def _longer(directory: Path) -> None:
    with open(weights_file(directory), "ab") as file:
        file.write(b"x")


def _no_header(directory: Path) -> None:
    weights_file(directory).write_bytes((64).to_bytes(8, "little") + b"?" * 100)


def _no_weights(directory: Path) -> None:
    weights_file(directory).unlink()


def _no_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


def _cut_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_text((directory / MANIFEST).read_text()[:100])


def _not_ours(directory: Path) -> None:
    changed_manifest(directory, lambda m: m.update(format="gguf"))


def _version(directory: Path) -> None:
    changed_manifest(directory, lambda m: m.update(version=2))


def _missing_key(directory: Path) -> None:
    changed_manifest(directory, lambda m: m.pop("prepared"))


def _elsewhere(directory: Path) -> None:
    changed_manifest(directory, lambda m: m.update(file="../other.safetensors"))


def _no_block(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["weights"]["gain"].update(block="lost"))


def _outside(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["weights"]["block.k.weight"].update(offset=10**6))


def _flip(directory: Path) -> None:
    file = weights_file(directory)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def _short_stride(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["weights"]["block.k.weight"].update(stride=[1]))


def _words(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["weights"]["block.k.weight"].update(offset="x"))


def _no_such_source(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["prepared"][0].update(sources=["lost"]))


def _no_sources(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["prepared"][0].update(sources=[]))


def _no_bytes(directory: Path) -> None:
    changed_manifest(directory, lambda m: m["weights"]["gain"].update(block=None))


def _weights_list(directory: Path) -> None:
    changed_manifest(directory, lambda m: m.update(weights=[1]))


def _two_of_one(directory: Path) -> None:
    """Saved of a model in which they are not tied."""

    def untie(m: dict) -> None:
        m["weights"]["head.weight"] = {**m["weights"]["head.weight"], "offset": 0, "stride": [1, 30]}

    changed_manifest(directory, untie)


DAMAGES: dict[Callable[[Path], None], str] = {
    _cut: r"has \d+ bytes, its header says \d+; save the model again",
    _cut_in_header: "is cut off or no safetensors file",
    _longer: r"has \d+ bytes, its header says \d+",
    _no_header: "has no readable header",
    _no_weights: "safetensors is missing",
    _no_manifest: "graphopt.json is missing: no model was saved there",
    _cut_manifest: "graphopt.json is damaged",
    _not_ours: "was not written by graphopt.save",
    _version: "has version 2, this reads 1",
    _missing_key: r"is damaged \(KeyError\('prepared'\)\)",
    _elsewhere: "names no file beside it",
    _flip: "has other bytes than were saved",
    _short_stride: "graphopt.json is damaged",
    _words: "is no place",
    _no_such_source: "is damaged .*'lost', no weight",
    _no_sources: "is damaged",
    _no_bytes: r"is damaged \(gain has no bytes\)",
    _weights_list: "graphopt.json is damaged",
    _two_of_one: "embed.weight and head.weight are one weight in the model and two as saved",
    _no_block: "block 'lost' is not in the file",
    _outside: "is no part of",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__[1:])
def test_damage_is_seen_before_anything_is_changed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    graphopt.save(run()[0], tmp_path)
    damage(tmp_path)
    other = mixed(7)
    before = state_of(other)
    with pytest.raises(ArtifactError, match=DAMAGES[damage]):
        graphopt.load(other, tmp_path)
    assert backend.STORE.owners.of(other) is None
    assert all(torch.equal(x, before[n]) for n, x in state_of(other).items())


def _lacks(model: Mixed) -> None:
    del model.packed


def _has_more(model: Mixed) -> None:
    model.more = nn.Linear(2, 2)


def _other_shape(model: Mixed) -> None:
    model.block.k = nn.Linear(20, 24, bias=False)


def _other_dtype(model: Mixed) -> None:
    model.block.half()


def _untied(model: Mixed) -> None:
    model.head.weight = nn.Parameter(model.head.weight.clone(), requires_grad=False)


MISFITS: dict[Callable[[Mixed], None], str] = {
    _untied: "embed.weight and head.weight are one weight as saved and two in the model",
    _lacks: "the model lacks packed; build it from the same configuration",
    _has_more: "saved was no more.bias, more.weight",
    _other_shape: r"block.k.weight is \[24, 20\] torch.float32 in the model and \[20, 20\] torch.float32 ",
    _other_dtype: r"block.\w+.weight is \[\d+, \d+\] torch.float16 in the model",
}


@pytest.mark.parametrize("change", MISFITS, ids=lambda c: c.__name__[1:])
def test_another_model_is_named(tmp_path: Path, change: Callable[[Mixed], None]) -> None:
    graphopt.save(run()[0], tmp_path)
    other = mixed(7)
    change(other)
    before = state_of(other)
    with pytest.raises(ArtifactError, match=MISFITS[change]):
        graphopt.load(other, tmp_path)
    assert all(torch.equal(x, before[n]) for n, x in state_of(other).items())


def test_another_configuration_is_told(tmp_path: Path) -> None:
    class Config:
        def __init__(self, eps: float) -> None:
            self.eps = eps

        def to_dict(self) -> dict[str, object]:
            return {"eps": self.eps, "_name_or_path": str(self.eps)}

    model = block()
    model.config = Config(0.1)
    graphopt.save(graphopt.optimize(model), tmp_path)
    other = block(1)
    other.config = Config(0.2)
    with pytest.warns(UserWarning, match=r"configuration differs .*: eps is 0\.2, saved was 0\.1"):
        graphopt.load(other, tmp_path)


def test_two_threads_may_save_at_a_time(tmp_path: Path) -> None:
    model, y = run()

    def work() -> None:
        for _ in range(5):
            graphopt.save(model, tmp_path)

    in_threads(*[work] * 3)
    assert not list(tmp_path.glob(".*.new"))
    assert torch.equal(graphopt.load(mixed(7), tmp_path)(TOKENS), y)


def test_what_cannot_be_saved_or_loaded_into(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"not optimized: call graphopt\.optimize"):
        graphopt.save(block(), tmp_path)
    with torch.device("meta"):
        empty = graphopt.optimize(block())
    with pytest.raises(ArtifactError, match="is on the meta device: there is nothing to save"):
        graphopt.save(empty, tmp_path)
    model, _ = run()
    graphopt.save(model, tmp_path)
    with pytest.raises(WeightError, match="optimized already; load into a new one"):
        graphopt.load(model, tmp_path)
    changed_manifest(tmp_path, lambda m: m["options"].update(quantise="int8"))
    other = mixed(7)
    with pytest.raises(OptionError, match="no option 'quantise'"):
        graphopt.load(other, tmp_path)
    assert torch.equal(other.packed, mixed(7).packed)
