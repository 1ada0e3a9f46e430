"""What can be compiled for, by name: its limits, its matrix instruction, and which device it stands for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from graphopt.errors import OptionError

CPU = "cpu"


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        name: as users write it, `cuda:90`.
        backend, arch: what Triton calls it: ("cuda", 90), ("hip", "gfx942").
        warp_size: threads that run in step.
        shared_memory: the most that one program may hold, in bytes.
        multiprocessors: of the largest common part (A100, H100, B200, MI300X): what a persistent grid fills.
        matrix: the instruction, as its assembly spells it, that a matrix product must become.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    multiprocessors: int
    matrix: str

    @property
    def is_hip(self) -> bool:
        """Whether this is an AMD GPU."""
        return self.backend == "hip"

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability times ten; 0 on AMD."""
        return self.arch if isinstance(self.arch, int) else 0


# Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (less 1 kB that
# the system keeps); AMD CDNA3 ISA guide, section 3.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cuda:80", "cuda", 80, 32, 166912, 108, "mma.sync"),
        Target("cuda:90", "cuda", 90, 32, 232448, 132, "wgmma"),
        Target("cuda:100", "cuda", 100, 32, 232448, 148, "tcgen05"),
        Target("hip:gfx942", "hip", "gfx942", 64, 65536, 304, "v_mfma"),
    )
}
NAMES = (CPU, *TARGETS)


def target_named(name: str) -> Target:
    """The GPU target of that name. Raises OptionError for another, with all there are."""
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}; it is one of {', '.join(TARGETS)}")
    return TARGETS[name]


@functools.cache
def target_of(device: torch.device) -> str:
    """The name of the target that serves a device: the newest one that is not newer, nor holds more.

    A Triton kernel is compiled for the device itself; the target chooses configurations, which must find room
    in its shared memory (capabilities 8.6, 8.9 and 12.0 have 101376 bytes). Raises OptionError for a device
    that none serves.
    """
    if device.type == "cpu":
        return CPU
    if device.type != "cuda" or not torch.cuda.is_available():
        raise OptionError(f"device {device} is none of graphopt's; targets are {', '.join(NAMES)}")
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        name = f"hip:{arch}"
        if name not in TARGETS:
            raise OptionError(f"device {device} is {name}; targets are {', '.join(NAMES)}")
        return name
    found = torch.cuda.get_device_properties(device)
    served = [t for t in TARGETS.values() if 0 < t.capability <= found.major * 10 + found.minor]
    if not served:
        capability = f"{found.major}.{found.minor}"
        raise OptionError(f"device {device} has compute capability {capability} < 8.0, the least served")
    least, room = min(t.shared_memory for t in served), found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in its stub
    if room < least:
        raise OptionError(f"device {device} has {room} bytes of shared memory < {least}, the least served")
    return max((t for t in served if t.shared_memory <= room), key=lambda t: t.capability).name
