"""Save an optimized model as it lies in memory, prepared weights included, and load it without preparing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import fx, nn

from graphopt import backend, tensor_file
from graphopt.api import optimize
from graphopt.errors import ArtifactError, WeightError
from graphopt.manifest import (
    MANIFEST,
    VERSION,
    Place,
    check_digest,
    check_places,
    check_prepared,
    check_rank,
    clear_others,
    home_of,
    parts_of,
    read_manifest,
    write_files,
)
from graphopt.options import Options
from graphopt.ownership import is_stand_in
from graphopt.runtime.ranks import mesh_of
from graphopt.same_model import check_names, check_ties, compare_configs, config_of, named_tensors
from graphopt.weights import ANY, PreparePlan

M = TypeVar("M", bound=nn.Module)


# --------------------------------------------------------------------------------------------------- saving


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write an optimized model's weights (as they are, prepared or not yet) and its options.

    What stood in the directory before is replaced at once when all is written, or not at all. Each of several
    processes writes its part, all with the same directory.

    Raises:
        WeightError: the model is not optimized.
        ArtifactError: a weight cannot be stored.
    """
    owned = backend.STORE.owners.of(model)
    if owned is None:
        raise WeightError("the model is not optimized: call graphopt.optimize(model) before graphopt.save")
    mesh = mesh_of(owned.options.shard)
    named = dict(named_tensors(model))
    name_of = {id(x): name for name, x in reversed(named.items())}
    held = [
        ([name_of[id(s)] for s in sources], entry)
        for sources, entry in backend.STORE.entries()
        if all(id(s) in name_of for s in sources)
    ]
    held.sort(key=lambda item: (item[0], item[1].plan.hash))
    wanted = {f"prepared:{i}": entry.value for i, (_, entry) in enumerate(held)}
    wanted |= {name: x for name, x in named.items() if not is_stand_in(x)}
    for name, x in wanted.items():
        if x.device.type == "meta":
            raise ArtifactError(f"weight {name} is on the meta device: there is nothing to save")
    blocks, places = _lay_out(wanted)
    released = {n: Place(tuple(x.shape), str(x.dtype)) for n, x in named.items() if n not in wanted}
    default = dataclasses.asdict(Options())
    mine = backend.STORE.owners.mine
    manifest = {
        "format": "graphopt",
        "version": VERSION,
        "options": {k: v for k, v in dataclasses.asdict(owned.options).items() if v != default[k]},
        "release": owned.release,
        "rank": mesh.rank if mesh else 0,
        "config": config_of(model),
        "stay": sorted(n for n, x in named.items() if isinstance(x, nn.Parameter) and x not in mine),
        "weights": {name: dataclasses.asdict({**places, **released}[name]) for name in sorted(named)},
        "prepared": [
            {"plan": entry.plan.hash, "sources": names, "value": dataclasses.asdict(places[f"prepared:{i}"])}
            for i, (names, entry) in enumerate(held)
        ],
    }
    write_files(home_of(Path(directory), mesh), manifest, blocks)
    clear_others(Path(directory), 1 if mesh is None else mesh.world)


def _lay_out(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Place]]:
    """What to store, each memory once, and where in it each tensor lies.

    A block is a tensor that fills its memory; the others in that memory are parts of it. What lies in memory
    that no tensor fills is a block of its own.
    """
    fills: dict[int, tuple[str, torch.Tensor]] = {}
    for name, x in tensors.items():
        ordered = x.detach().permute(sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True))
        if ordered.is_contiguous() and ordered.nbytes == ordered.untyped_storage().nbytes() > 0:
            fills.setdefault(ordered.data_ptr(), (name, ordered))
    blocks: dict[str, torch.Tensor] = {}
    places: dict[str, Place] = {}
    for name, x in tensors.items():
        home, block = fills.get(x.untyped_storage().data_ptr(), (name, x))
        if block is x or block.dtype != x.dtype:
            home, block = name, x.detach().contiguous()
            stride, offset = block.stride(), 0
        else:
            stride, offset = x.stride(), int(x.storage_offset())
        blocks[home] = block
        places[name] = Place(tuple(x.shape), str(x.dtype), home, tuple(stride), offset)
    return blocks, places


# -------------------------------------------------------------------------------------------------- loading


def load(model: M, directory: str | os.PathLike[str]) -> M:
    """Give a freshly built model (of any weights, or on the meta device) what was saved, and optimize it.

    The first call finds what was prepared: released weights are at no time in memory as they were. Weights
    that were on the meta device come to the CPU.

    Raises:
        ArtifactError: the files are damaged or of another version, or the model has other weights; nothing
            is changed then.
        OptionError: it was saved by another number of processes.
        WeightError: the model is optimized already.
    """
    if backend.STORE.owners.of(model) is not None:
        raise WeightError("the model is optimized already; load into a new one")
    world = max(parts_of(Path(directory)).values(), default=1)
    path = home_of(Path(directory), mesh_of(world))
    manifest = read_manifest(path / MANIFEST)
    file = path / str(manifest["file"])
    stored = tensor_file.read_header(file)
    try:
        places = {name: Place.parse(p) for name, p in manifest["weights"].items()}
        prepared = [(p["plan"], p["sources"], Place.parse(p["value"])) for p in manifest["prepared"]]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["options"].items()}
        release = bool(manifest["release"])
        stay = frozenset(manifest.get("stay", ()))
        check_places(path, stored, [*places.values(), *(place for _, _, place in prepared)])
        check_prepared(path, places, prepared)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged ({error!r}); save the model again") from error
    check_rank(path, manifest, mesh_of(Options.parse(options).shard))
    check_names(model, places)
    check_ties(model, places)
    compare_configs(manifest.get("config"), config_of(model))
    check_digest(file)
    tensors = _fill(model, places, prepared, file, stored)
    if release:
        taken = [x for name, x in tensors.items() if isinstance(x, nn.Parameter) and name not in stay]
        backend.STORE.owners.take(taken)
    return optimize(model, release=release, **options)


def _fill(
    model: nn.Module,
    places: Mapping[str, Place],
    prepared: Sequence[tuple[str, list[str], Place]],
    file: Path,
    stored: Mapping[str, tensor_file.Stored],
) -> dict[str, torch.Tensor]:
    """Free what the model holds and read block by block, so that no weight is in memory twice."""
    owners = backend.STORE.owners
    tensors = _off_meta(model)
    inside: dict[str, dict[int, tuple[torch.Tensor, Place]]] = {block: {} for block in stored}
    for name, x in tensors.items():
        place = places[name]
        if place.block is None:
            owners.give_stand_in(x, place.shape)
            continue
        x.data = torch.empty(0, dtype=x.dtype, device=x.device)
        inside[place.block][id(x)] = x, place
    devices = {place.block: tensors[names[0]].device for _, names, place in prepared}
    bases: dict[str, torch.Tensor] = {}
    for block, about in stored.items():
        members = inside[block].values()
        device = next((x.device for x, _ in members), devices.get(block))
        base = bases[block] = torch.empty(about.shape, dtype=about.dtype, device=device)
        tensor_file.read_into(file, about, base)
        for x, place in members:
            x.data = place.of(base)
    for plan, names, place in prepared:
        sources = tuple(tensors[name] for name in names)
        state = tuple(
            (ANY if places[name].block == place.block else x._version, x.data_ptr())
            for name, x in zip(names, sources, strict=True)
        )
        backend.STORE.keep(sources, _known(plan, names), place.of(bases[str(place.block)]), state)
    return tensors


def _off_meta(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, each of those on meta replaced by an empty one on the CPU; tied ones stay tied."""
    replaced: dict[int, torch.Tensor] = {}
    originals = dict(named_tensors(model))  # alive, so that no id occurs twice
    for name, x in originals.items():
        if x.device.type != "meta":
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if id(x) not in replaced:
            new = torch.empty(0, dtype=x.dtype)
            is_parameter = isinstance(x, nn.Parameter)
            replaced[id(x)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        setattr(module, leaf, replaced[id(x)])  # as the parameter or buffer that it is
    return {name: replaced.get(id(x), x) for name, x in originals.items()}


def _known(plan: str, names: list[str]) -> PreparePlan:
    """A plan of which only the result is known."""
    graph = fx.Graph()
    graph.output(())
    return PreparePlan(fx.GraphModule(nn.Module(), graph), plan, (), tuple(names))
