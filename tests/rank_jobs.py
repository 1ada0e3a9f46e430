"""What one rank does in the tests of several processes: jobs by name, their results as JSON in a folder."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

import graphopt
from graphopt import backend, defaults
from graphopt.certificates import Certificates
from graphopt.errors import GraphoptError
from graphopt.runtime.ranks import RankError
from tests import test_combinations
from tests.models import zoo
from tests.sharding.models import given, model
from tests.verifying import wrong_translation

TIMEOUT = 60  # seconds that a rank waits for another
IN_A_BLOCK = re.compile(r"\.(layers?|h)\.\d+\.")


def distance(name: str, cache: str, *, release: bool = True, **options: object) -> dict[str, object]:
    """How far a model's logits of prefill and two decode steps are from one process's; what was compiled."""
    built, inputs = model(name), given(name)
    with torch.no_grad():
        want = zoo.real(zoo.run(built, inputs, cache), inputs)
        torch.compiler.reset()
        backend.clear_reports()
        optimized = graphopt.optimize(copy.deepcopy(built), strict=True, release=release, **options)
        found = zoo.real(zoo.run(optimized, inputs, cache), inputs)
    far = {k: float((found[k] - want[k]).abs().max()) for k in want if k.startswith("logits")}
    same = all(bool((found[k].argmax(-1) == want[k].argmax(-1)).all()) for k in far)
    counts = [(r.counts.get("all_reduce"), r.counts.get("all_gather")) for r in backend.reports()]
    report = backend.reports()[-1]
    return {
        "far": max(far.values()), "same_tokens": same, "counts": counts,
        "blocks": block_bytes(built, optimized), "model": report.sharded_bytes,
        "told": next(row.strip() for row in str(report).splitlines() if "on this rank" in row),
    }  # fmt: skip


def block_bytes(whole: nn.Module, optimized: nn.Module) -> dict[str, int]:
    """The bytes of attention's and the MLP's matrices, those of keys and values, and what this rank holds."""
    given = {n: p for n, p in whole.named_parameters() if p.dim() == 2 and IN_A_BLOCK.search(n)}
    names = {id(p): n for n, p in optimized.named_parameters() if n in given}
    left, held = set(given), 0
    for sources, entry in backend.STORE.entries():
        if all(id(x) in names for x in sources):
            left -= {names[id(x)] for x in sources}
            held += entry.value.nbytes
    keys_and_values = [p.nbytes for n, p in given.items() if n.split(".")[-2] in ("k_proj", "v_proj")]
    return {
        "whole": sum(p.nbytes for p in given.values()),
        "keys and values": sum(keys_and_values),
        "held": held + sum(given[n].nbytes for n in left),
    }


def logits(world: int) -> object:
    """All families, without a cache."""
    names = ("llama", "qwen3", "gemma2", "gpt2", "bert")
    return {name: distance(name, "none", shard=world, release=name != "bert") for name in names}


def caches(world: int) -> object:
    """With caches: static ones, which the caller allocates, and dynamic ones, which the graph returns."""
    return {
        "static": distance("gemma2", "static", shard=world),
        "dynamic": distance("llama", "dynamic", shard=world),
    }


def compiled(world: int) -> object:
    """Through `torch.compile`."""
    torch.compiler.reset()
    built, inputs = model("llama"), given("llama")
    call = torch.compile(copy.deepcopy(built), backend="graphopt", options={"shard": world, "strict": True})
    with torch.no_grad():
        return float((call(**inputs).logits - built(**inputs).logits).abs().max())


def planned(world: int) -> object:
    """With the plan that the library has for the model: what it leaves open is decided here."""
    config = model("llama").config
    assert isinstance(config, PretrainedConfig)
    plan = dict(config.base_model_tp_plan or {})
    return distance("llama", "none", shard=world, shard_plan=plan)


def generated(world: int) -> object:
    """Greedy tokens of Hugging Face's own loop, of one process and of all together."""
    torch.compiler.reset()
    built = model("llama", tied=False)
    optimized = graphopt.optimize(copy.deepcopy(built), shard=world, strict=True)
    ids = torch.tensor([[5, 17, 33, 8]])
    with torch.no_grad():
        return [
            m.generate(ids, max_new_tokens=6, do_sample=False).tolist()  # type: ignore[operator]  # a method
            for m in (built, optimized)
        ]


def saved(world: int) -> object:
    """In int8, saved by all ranks into one directory and loaded: how far logits are, and what is prepared."""
    torch.compiler.reset()
    built = test_combinations.model("llama")
    inputs = zoo.inputs(built, zoo.Case())
    want = test_combinations.fake_quantized(built)(**inputs).logits
    ours = graphopt.optimize(copy.deepcopy(built), shard=world, quantize="int8", strict=True)
    far = [float((ours(**inputs).logits - want).abs().max())]
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    graphopt.save(ours, where[0])
    before = backend.STORE.prepared
    loaded = graphopt.load(built, where[0])
    far.append(float((loaded(**inputs).logits - want).abs().max()))
    dist.barrier()
    shutil.rmtree(where[0], ignore_errors=True)
    return {"far": max(far), "prepared": backend.STORE.prepared - before}


def verified(world: int) -> object:
    """One rank has a wrong rule: all ranks take its matches back, and none waits for another."""
    torch.compiler.reset()
    backend.clear_reports()
    backend.CERTIFICATES = Certificates()
    built, inputs = model("llama"), given("llama")
    right = defaults.RULES
    if dist.get_rank() == world - 1:
        defaults.RULES = wrong_translation("torch_sdpa", lambda given: {"scale": 0.5})
    options = {"shard": world, "verify": "first"}
    call = torch.compile(copy.deepcopy(built), backend="graphopt", options=options)
    with torch.no_grad():
        far = float((call(**inputs).logits - built(**inputs).logits).abs().max())
    defaults.RULES = right
    found = backend.reports()[-1].verification
    assert found is not None
    taken, left = [t.rule for t in found.taken_back], [n.rule for n in found.not_verified]
    return {
        "far": far,
        "judged": found.judged,
        "taken_back": taken,
        "not_verified": left,
        "whole": str(found.whole),
    }


def another_world(world: int) -> object:
    """A number of ranks that does not run."""
    return message(lambda: graphopt.optimize(copy.deepcopy(model("llama")), shard=world + 1))


def other_options(world: int) -> object:
    """The last rank has other options."""
    torch.compiler.reset()
    merge = dist.get_rank() != world - 1
    optimized = graphopt.optimize(copy.deepcopy(model("llama")), shard=world, merge=merge)
    return message(lambda: optimized(**given("llama")))


def does_not_divide(world: int) -> object:
    """Heads that do not divide: nothing has changed, and eager still runs."""
    torch.compiler.reset()
    built = copy.deepcopy(zoo.model("bert"))  # 3 heads
    optimized = graphopt.optimize(built, shard=world)
    with torch.no_grad():
        return message(lambda: optimized(**zoo.inputs(built, zoo.Case())))


def left_alone(world: int) -> object:
    """The last rank is gone after the first step."""
    torch.compiler.reset()
    optimized = graphopt.optimize(copy.deepcopy(model("llama")), shard=world)
    with torch.no_grad():
        optimized(**given("llama"))
        if dist.get_rank() == world - 1:
            os._exit(3)
        start = time.monotonic()
        told = message(lambda: optimized(**given("llama")))
    return {"told": told, "seconds": time.monotonic() - start}


def message(call: Callable[[], object]) -> str:
    """The kind and text of the error that a call raises."""
    try:
        with torch.no_grad():
            call()
    except Exception as error:
        kind = "RankError" if isinstance(error, RankError) else type(error).__name__
        ours = "" if isinstance(error, GraphoptError) else "not ours: "
        return f"{ours}{kind}: {error}"
    return "nothing was raised"


JOBS: Mapping[str, Callable[[int], object]] = {
    job.__name__: job
    for job in (
        logits, caches, compiled, planned, generated, saved, verified, another_world, other_options,
        does_not_divide, left_alone,
    )
}  # fmt: skip


def main(folder: str, *jobs: str) -> None:
    """Run the jobs; the group is found by the environment (torchrun), or by a file in the folder."""
    torch.set_num_threads(1)
    if "MASTER_PORT" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    else:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        meeting, wait = f"file://{folder}/group", timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=wait)
    for job in jobs:
        result = JOBS[job](dist.get_world_size())
        Path(folder, f"{job}{dist.get_rank()}.json").write_text(json.dumps(result))
    # gloo's threads take Python's lock when they drop their tensors: at Python's own end that would abort.
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
