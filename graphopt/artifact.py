"""Save an optimized model as it lies in memory, prepared weights included, and load it without preparing.

A directory: `graphopt.json`, the manifest, and the safetensors file that it names. Never a pickle.
Each block of memory is stored once; weights and prepared forms say which part of a block they are:

    "weights":  {"q": {"block": "prepared:0", "shape": [4, 8], "stride": [8, 1], "offset": 0, ...}, ...}
    "prepared": [{"plan": "40e5...", "sources": ["q", "k", "v"], "value": {"block": "prepared:0", ...}}]

Processes that share the weights (`shard`) have their parts in directories of their own inside: `rank0of2`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx, nn

from graphopt import backend, tensor_file
from graphopt.api import optimize
from graphopt.errors import ArtifactError, WeightError
from graphopt.options import Options
from graphopt.ownership import is_stand_in
from graphopt.runtime.ranks import Mesh, mesh_of
from graphopt.weights import ANY, PreparePlan

M = TypeVar("M", bound=nn.Module)

MANIFEST = "graphopt.json"
VERSION = 1
FLOATS = frozenset(str(d) for d in tensor_file.NAMES if d.is_floating_point)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a part of a block; in no block where its bytes were released."""

    shape: tuple[int, ...]
    dtype: str
    block: str | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0

    @staticmethod
    def parse(given: Mapping[str, object]) -> Place:
        """From a manifest."""
        return Place(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})  # type: ignore[arg-type]  # checked by use

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """The part of a block's memory."""
        return base.as_strided(self.shape, self.stride, self.offset)


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
    named = dict(_named(model))
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
        "config": _config(model),
        "stay": sorted(n for n, x in named.items() if isinstance(x, nn.Parameter) and x not in mine),
        "weights": {name: dataclasses.asdict({**places, **released}[name]) for name in sorted(named)},
        "prepared": [
            {"plan": entry.plan.hash, "sources": names, "value": dataclasses.asdict(places[f"prepared:{i}"])}
            for i, (names, entry) in enumerate(held)
        ],
    }
    _write(_home(Path(directory), mesh), manifest, blocks)
    _clear(Path(directory), 1 if mesh is None else mesh.world)


def _home(directory: Path, mesh: Mesh | None) -> Path:
    """Where a process has its part."""
    return directory if mesh is None else directory / f"rank{mesh.rank}of{mesh.world}"


def _parts(directory: Path) -> dict[Path, int]:
    """Where something is saved, and by how many processes."""
    found = {directory: 1}
    for part in directory.glob("rank*of*"):
        if name := re.fullmatch(r"rank\d+of(\d+)", part.name):
            found[part] = int(name[1])
    return {part: world for part, world in found.items() if (part / MANIFEST).exists()}


def _clear(directory: Path, world: int) -> None:
    """Take away what another number of processes has saved there before."""
    for part, other in _parts(directory).items():
        if other != world:
            for old in (part / MANIFEST, *part.glob("weights-*.safetensors")):
                old.unlink(missing_ok=True)  # another process may be at it


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


def _write(directory: Path, manifest: Mapping[str, object], blocks: Mapping[str, torch.Tensor]) -> None:
    """The file of weights under a name by its content, then the manifest that names it, in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{MANIFEST}.", suffix=".new", dir=directory)
    new = Path(name)
    try:
        os.close(handle)
        new.chmod(0o666 & ~_umask())  # mkstemp lets nobody else read it
        digest = tensor_file.write(new, blocks)
        file = directory / f"weights-{digest[:16]}.safetensors"
        os.replace(new, file)
        text = json.dumps({**manifest, "file": file.name}, indent=1)
        with open(new, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(new, directory / MANIFEST)
    finally:
        new.unlink(missing_ok=True)
    for old in directory.glob("weights-*.safetensors"):
        if old != file:
            old.unlink(missing_ok=True)  # another save may be at it


def _umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _config(model: nn.Module) -> dict[str, object] | None:
    """What a model says of its configuration, as far as JSON holds it, but for where it came from."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not callable(to_dict):
        return None
    said = json.loads(json.dumps(to_dict(), default=str))
    return {k: v for k, v in said.items() if not k.startswith("_") and k not in _NO_RESULT}


# Entries of a configuration that no result depends on.
_NO_RESULT = frozenset({"transformers_version", "architectures", "use_cache", "return_dict"})


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
    world = max(_parts(Path(directory)).values(), default=1)
    path = _home(Path(directory), mesh_of(world))
    manifest = _read_manifest(path / MANIFEST)
    file = path / str(manifest["file"])
    stored = tensor_file.read_header(file)
    try:
        places = {name: Place.parse(p) for name, p in manifest["weights"].items()}
        prepared = [(p["plan"], p["sources"], Place.parse(p["value"])) for p in manifest["prepared"]]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["options"].items()}
        release = bool(manifest["release"])
        stay = frozenset(manifest.get("stay", ()))
        _check_places(path, stored, [*places.values(), *(place for _, _, place in prepared)])
        _check_prepared(path, places, prepared)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged ({error!r}); save the model again") from error
    _check_rank(path, manifest, mesh_of(Options.parse(options).shard))
    _check_names(model, places)
    _check_ties(model, places)
    _compare_configs(manifest.get("config"), _config(model))
    _check_digest(file)
    tensors = _fill(model, places, prepared, file, stored)
    if release:
        taken = [x for name, x in tensors.items() if isinstance(x, nn.Parameter) and name not in stay]
        backend.STORE.owners.take(taken)
    return optimize(model, release=release, **options)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: no model was saved there by graphopt.save") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}); save the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "graphopt":
        raise ArtifactError(f"{path} was not written by graphopt.save")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{path} has version {manifest.get('version')}, this reads {VERSION}; save it again"
        )
    if not isinstance(manifest.get("file"), str) or "/" in manifest["file"]:
        raise ArtifactError(f"{path} names no file beside it; save the model again")
    return manifest


def _check_rank(path: Path, manifest: Mapping[str, object], mesh: Mesh | None) -> None:
    """Parts of weights are those of this process."""
    if mesh is not None and manifest.get("rank") != mesh.rank:
        raise ArtifactError(
            f"{path} has the weights of rank {manifest.get('rank')} of {mesh.world}, and this is rank "
            f"{mesh.rank}; load the directory that was given to graphopt.save"
        )


def _check_places(path: Path, stored: Mapping[str, tensor_file.Stored], places: list[Place]) -> None:
    """Every part lies inside a block that the file has."""
    for place in places:
        if place.block is None:
            continue
        block = stored.get(place.block)
        if block is None:
            raise ArtifactError(f"{path}: block {place.block!r} is not in the file; save the model again")
        if not isinstance(place.offset, int) or not all(
            isinstance(n, int) for n in place.shape + place.stride
        ):
            raise ArtifactError(f"{path}: {place} is no place; save the model again")
        last = place.offset + sum((n - 1) * s for n, s in zip(place.shape, place.stride, strict=True))
        size = block.nbytes // block.dtype.itemsize
        if str(block.dtype) != place.dtype or (
            0 not in place.shape
            and not (min((place.offset, *place.stride)) >= 0 and place.offset <= last < size)
        ):
            raise ArtifactError(f"{path}: {place} is no part of {block}; save the model again")


def _check_prepared(
    path: Path, places: Mapping[str, Place], prepared: Sequence[tuple[str, list[str], Place]]
) -> None:
    """Every prepared weight has bytes, and sources that are weights; only float matrices were released."""
    for name, place in places.items():
        kept = place.dtype in FLOATS and len(place.shape) > 1 and math.prod(place.shape) > 1
        if place.block is None and not kept:
            raise ArtifactError(f"{path} is damaged ({name} has no bytes); save the model again")
    for plan, names, place in prepared:
        if not isinstance(plan, str) or not isinstance(names, list) or not names or place.block is None:
            raise ArtifactError(f"{path} is damaged (prepared {plan!r} of {names!r}); save the model again")
        for name in names:
            if name not in places:
                raise ArtifactError(
                    f"{path} is damaged (prepared of {name!r}, no weight); save the model again"
                )


def _check_ties(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Names that are one tensor in the model are one as saved, and the reverse for parameters."""
    named = dict(_named(model))
    first: dict[int, str] = {}
    for name, x in named.items():
        other = first.setdefault(id(x), name)
        if places[other] != places[name]:
            raise ArtifactError(
                f"{other} and {name} are one weight in the model and two as saved; build it from the same "
                "configuration"
            )
    at: dict[Place, str] = {}
    for name, place in places.items():
        if place.block is None or 0 in place.shape or not isinstance(named[name], nn.Parameter):
            continue
        other = at.setdefault(place, name)
        if named[other] is not named[name] and not _shared(named[other], named[name]):
            raise ArtifactError(
                f"{other} and {name} are one weight as saved and two in the model; build it from the same "
                "configuration"
            )


def _shared(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors lie in the same memory; on meta they may."""
    return one.device.type == "meta" or one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def _compare_configs(saved: Mapping[str, object] | None, given: Mapping[str, object] | None) -> None:
    """Warn where the model's configuration is another than the saved one's: results may be others then."""
    if not isinstance(saved, dict) or given is None:
        return
    changed = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k))
    if changed:
        shown = "; ".join(f"{k} is {given.get(k)!r}, saved was {saved.get(k)!r}" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        warnings.warn(f"the model's configuration differs from the saved one's: {shown}{more}", stacklevel=3)


def _check_digest(file: Path) -> None:
    """The bytes are those that were saved: the file's name says so."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 22):
            digest.update(part)
    if file.name != f"weights-{digest.hexdigest()[:16]}.safetensors":
        raise ArtifactError(
            f"{file} has other bytes than were saved (SHA-256 {digest.hexdigest()[:16]}); save again"
        )


def _check_names(model: nn.Module, places: Mapping[str, Place]) -> None:
    """The model has the weights that were saved, no more and no less, of the same shapes and dtypes."""
    named = dict(_named(model))
    for text, names in (
        ("the model lacks", places.keys() - named.keys()),
        ("saved was no", named.keys() - places.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ArtifactError(f"{text} {shown}; build it from the same configuration")
    for name, x in named.items():
        place = places[name]
        if (tuple(x.shape), str(x.dtype)) != (place.shape, place.dtype):
            raise ArtifactError(
                f"{name} is {list(x.shape)} {x.dtype} in the model and {list(place.shape)} {place.dtype} "
                "as saved; build it from the same configuration"
            )


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
    originals = dict(_named(model))  # alive, so that no id occurs twice
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


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by all its names, buffers outside the state dict included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
