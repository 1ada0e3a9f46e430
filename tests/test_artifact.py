"""Saved and loaded: weights as they lie in memory, nothing prepared again, nothing changed by an error."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import graphopt
from graphopt import artifact, backend, tensor_file
from graphopt.artifact import MANIFEST
from graphopt.errors import ArtifactError, OptionError, ReleasedError, WeightError
from graphopt.ownership import is_stand_in
from graphopt.runtime.ranks import Mesh
from tests.block import MERGED, Block, agree, block, counted, example

pytestmark = pytest.mark.usefixtures("emptied")


class Mixed(nn.Module):
    """Tied, packed, merged and plain weights, in two dtypes; buffers inside and outside the state dict."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(30, 20)
            self.block = Block(seed)
            self.packed = nn.Parameter(torch.randn(64, 64))
            self.head = nn.Linear(20, 30, bias=False)
            self.head.weight = self.embed.weight
            self.gain = nn.Parameter(torch.randn(20).double())
            self.register_buffer("shift", torch.randn(3, 20))
            self.register_buffer("mean", torch.randn(20), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.gain.float() + self.mean
        wide = nn.functional.linear(nn.functional.pad(x, (0, 44)), self.packed)
        x = self.block(x) + wide[..., :20] + self.shift[1]
        return self.head(x)


TOKENS = torch.tensor([[1, 5, 2, 7], [3, 3, 0, 29]])


def mixed(seed: int = 0) -> Mixed:
    return Mixed(seed).eval().requires_grad_(False)


OPTIONS: dict[str, object] = {"strict": True, "quantize": "int8"}


def reference(model: nn.Module) -> torch.Tensor:
    """What the program gives on weights that are not owned."""
    return torch.compile(model, backend="graphopt", options=dict(OPTIONS))(TOKENS)


def run(seed: int = 0) -> tuple[Mixed, torch.Tensor]:
    """An optimized model that has run, and its result."""
    model = graphopt.optimize(mixed(seed), **OPTIONS)
    return model, model(TOKENS)


def weights_file(directory: Path) -> Path:
    (file,) = directory.glob("weights-*.safetensors")
    return file


def changed_manifest(directory: Path, change: Callable[[dict], object]) -> None:
    """Edit a manifest."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: x.detach().clone() for n, x in (*model.named_parameters(), *model.named_buffers())}


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


# ---------------------------------------------------------------------------------------------------- errors


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
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                graphopt.save(model, tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not list(tmp_path.glob(".*.new"))
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


# --------------------------------------------------------------------------------------- several processes


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
