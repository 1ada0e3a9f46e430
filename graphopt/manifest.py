"""What a saved model is on disk: its manifest, the file of weights beside it, and whether both are whole.

A directory: `graphopt.json`, the manifest, and the safetensors file that it names. Never a pickle.
Each block of memory is stored once; weights and prepared forms say which part of a block they are:

    "weights":  {"q": {"block": "prepared:0", "shape": [4, 8], "stride": [8, 1], "offset": 0, ...}, ...}
    "prepared": [{"plan": "40e5...", "sources": ["q", "k", "v"], "value": {"block": "prepared:0", ...}}]

Processes that share the weights (`shard`) have their parts in directories of their own inside: `rank0of2`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt import tensor_file
from graphopt.errors import ArtifactError
from graphopt.runtime.ranks import Mesh

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


def home_of(directory: Path, mesh: Mesh | None) -> Path:
    """Where a process has its part."""
    return directory if mesh is None else directory / f"rank{mesh.rank}of{mesh.world}"


def parts_of(directory: Path) -> dict[Path, int]:
    """Where something is saved, and by how many processes."""
    found = {directory: 1}
    for part in directory.glob("rank*of*"):
        if name := re.fullmatch(r"rank\d+of(\d+)", part.name):
            found[part] = int(name[1])
    return {part: world for part, world in found.items() if (part / MANIFEST).exists()}


def clear_others(directory: Path, world: int) -> None:
    """Take away what another number of processes has saved there before."""
    for part, other in parts_of(directory).items():
        if other != world:
            for old in (part / MANIFEST, *part.glob("weights-*.safetensors")):
                old.unlink(missing_ok=True)  # another process may be at it


def write_files(directory: Path, manifest: Mapping[str, object], blocks: Mapping[str, torch.Tensor]) -> None:
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


def read_manifest(path: Path) -> dict[str, Any]:
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


def check_rank(path: Path, manifest: Mapping[str, object], mesh: Mesh | None) -> None:
    """Parts of weights are those of this process."""
    if mesh is not None and manifest.get("rank") != mesh.rank:
        raise ArtifactError(
            f"{path} has the weights of rank {manifest.get('rank')} of {mesh.world}, and this is rank "
            f"{mesh.rank}; load the directory that was given to graphopt.save"
        )


def check_places(path: Path, stored: Mapping[str, tensor_file.Stored], places: list[Place]) -> None:
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


def check_prepared(
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


def check_digest(file: Path) -> None:
    """The bytes are those that were saved: the file's name says so."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 22):
            digest.update(part)
    if file.name != f"weights-{digest.hexdigest()[:16]}.safetensors":
        raise ArtifactError(
            f"{file} has other bytes than were saved (SHA-256 {digest.hexdigest()[:16]}); save again"
        )
