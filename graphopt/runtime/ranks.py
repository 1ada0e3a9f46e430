"""Processes that run one model together: their mesh, whether they agree, and the error when one is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from graphopt.errors import GraphoptError, OptionError
from graphopt.runtime.held import MARKS, Held

R = TypeVar("R")
AXIS = "tp"
DIGEST = 16  # characters of a plan's hash

# What torch.distributed's backends say when a peer is gone or does not come.
LOST = re.compile(
    r"\bgloo\b|\bnccl|connection (was )?(closed|reset|refused)|\btimed out|\btimeout\b|broken pipe|"
    r"\bsocket\b|process group|\bTCPStore\b",
    re.IGNORECASE,
)


class RankError(GraphoptError):
    """Ranks that run different programs, or of which one is gone."""


@dataclass(frozen=True)
class Mesh:
    """The processes along one axis.

    Attributes:
        axis: its name in graphs.
        world, rank: how many processes, and which this one is.
        group: the name by which torch finds the process group.
        backend: "gloo", "nccl".
    """

    axis: str
    world: int
    rank: int
    group: str
    backend: str


def mesh_of(world: int) -> Mesh | None:
    """The mesh of all processes, for `shard=world`; None for a world of one.

    Raises:
        OptionError: torch.distributed does not run, or runs another number of processes.
    """
    if world == 1:
        return None
    start = (
        f"start the program with `torchrun --nproc-per-node {world} program.py`, and call "
        "torch.distributed.init_process_group('gloo') (CPUs; 'nccl' for GPUs) before graphopt compiles"
    )
    if not dist.is_available():
        raise OptionError(f"option 'shard' is {world}, but this build of torch has no torch.distributed")
    if not dist.is_initialized():
        raise OptionError(f"option 'shard' is {world}, but torch.distributed is not initialised; {start}")
    if dist.get_world_size() != world:
        raise OptionError(
            f"option 'shard' is {world}, but torch.distributed runs {dist.get_world_size()} processes; "
            f"{start}"
        )
    group = dist.group.WORLD
    assert group is not None
    return Mesh(AXIS, world, dist.get_rank(), group.group_name, dist.get_backend())


def digest(*parts: object) -> str:
    """A hash of what the ranks have to agree in."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:DIGEST]


def agree(mesh: Mesh, plan: str) -> None:
    """Return if all ranks call this with the same hash.

    Raises:
        RankError: naming the ranks that differ from most.
    """
    device = "cuda" if mesh.backend == "nccl" else "cpu"
    mine = torch.tensor(list(plan.encode().ljust(DIGEST)[:DIGEST]), dtype=torch.uint8, device=device)
    every = [torch.empty_like(mine) for _ in range(mesh.world)]
    dist.all_gather(every, mine)
    found = [bytes(t.tolist()).decode() for t in every]
    usual, _ = Counter(found).most_common(1)[0]
    others = [rank for rank, other in enumerate(found) if other != usual]
    if others:
        shown = ", ".join(f"rank {r}: {h.strip()}" for r, h in enumerate(found))
        raise RankError(
            f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} of {mesh.world} would run another "
            f"program than the others (plans {shown}); all ranks need the same model, inputs of the same "
            "shapes, options and versions"
        )


@dataclass
class Ranked:
    """A program that runs on all ranks together: before its first step they compare their plans.

    Raises, when called:
        RankError: the plans differ; a rank is gone, or did not come within the group's timeout.
        ShardError: an input holds the rank's own heads alone, and the program reads all.
    """

    run: Callable[..., object]
    mesh: Mesh
    digest: str
    held: Held = field(default_factory=Held)
    agreed: bool = field(default=False, init=False)

    def __call__(self, *args: object) -> object:
        """Run on values in placeholder order."""
        try:
            if not self.agreed:
                agree(self.mesh, self.digest)
                self.agreed = True
            MARKS.check(self.held, args)
            passing = MARKS.passing(self.held, args)
            result = self.run(*args)
            MARKS.note(self.held, args, result, passing)
            return result
        except RuntimeError as error:
            reason = lost(self.mesh, error)
            if reason is None:
                raise
            raise RankError(reason) from error


def gathered(mesh: Mesh | None, mine: list[R], read: Callable[[dict[str, Any]], R]) -> list[R]:
    """What all ranks have, in their order, each thing once; all of them have to call this.

    Args:
        mine: frozen dataclasses, which travel as JSON.
        read: makes one of its fields.

    Raises:
        RankError: a rank is gone, or did not come in time.
    """
    if mesh is None:
        return mine
    every: list[str] = [""] * mesh.world
    try:
        dist.all_gather_object(every, json.dumps([dataclasses.asdict(x) for x in mine]))  # type: ignore[call-overload]  # a dataclass
    except RuntimeError as error:
        raise RankError(lost(mesh, error) or str(error)) from error
    found = [read(fields) for text in every for fields in json.loads(text)]
    return list(dict.fromkeys(found))


def lost(mesh: Mesh, error: RuntimeError) -> str | None:
    """What to tell of an error that comes from another rank's end; None for any other error."""
    if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
        return None
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"rank {mesh.rank} of {mesh.world} waited in a collective of group {mesh.group!r} (axis "
        f"{mesh.axis!r}, {mesh.backend}) for a rank that is gone or did not come in time: {first}. Look at "
        "the other ranks' output for the first error; TORCH_DISTRIBUTED_DEBUG=DETAIL names the collective"
    )
