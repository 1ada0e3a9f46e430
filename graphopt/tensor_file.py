"""Read and write safetensors files tensor by tensor: memory is written from where it lies and read to there.

The library's own functions hold all of a file's bytes a second time; these hold none.
Format: 8 bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from graphopt.errors import ArtifactError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100_000_000  # bytes; the limit of the format's own library


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what it is and where its bytes start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write contiguous tensors and flush them to the disk; returns the file's SHA-256."""
    header: dict[str, object] = {}
    offset = 0
    for name, x in tensors.items():
        if x.dtype not in NAMES:
            raise ArtifactError(f"{name} is {x.dtype}; files hold {', '.join(map(str, NAMES))}")
        end = offset + x.numel() * x.element_size()
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for x in tensors.values():
            here = x.detach().cpu().contiguous()  # itself, but for other devices
            left = _bytes(here)
            digest.update(left)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, Stored]:
    """What a file holds.

    Raises:
        ArtifactError: it is cut off, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MOST_HEADER, size - 8):
                raise ArtifactError(
                    f"{path} is cut off or no safetensors file: {size} bytes, header of {length}"
                )
            header = json.loads(file.read(length))
        stored = {}
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, end = about["data_offsets"]
            shape = tuple(about["shape"])
            stored[name] = Stored(DTYPES[about["dtype"]], shape, 8 + length + start, end - start)
            if end - start != math.prod(shape) * stored[name].dtype.itemsize:
                raise ArtifactError(
                    f"{path}: {name} {list(shape)} has {end - start} bytes; save the model again"
                )
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; save the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} has no readable header ({error}); save the model again") from error
    needed = max((s.start + s.nbytes for s in stored.values()), default=8 + length)
    if size != needed:
        raise ArtifactError(f"{path} has {size} bytes, its header says {needed}; save the model again")
    return stored


def read_into(path: Path, stored: Stored, x: torch.Tensor) -> None:
    """Fill a contiguous tensor of that dtype and shape."""
    here = x if x.device.type == "cpu" else torch.empty(x.shape, dtype=x.dtype)
    left = _bytes(here)
    with open(path, "rb", buffering=0) as file:
        file.seek(stored.start)
        while left:
            count = file.readinto(left)
            if not count:
                raise ArtifactError(f"{path} became shorter while it was read; save the model again")
            left = left[count:]
    if here is not x:
        x.copy_(here)


def _bytes(x: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, without numpy; valid as long as the tensor lives."""
    nbytes = x.numel() * x.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * nbytes).from_address(x.data_ptr())).cast("B")
