"""One process of the demo's two, started by torchrun: generates with its part of the weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import graphopt
from graphopt import backend
from graphopt.tools import demo_models as models


def main(folder: str, layers: int, new: int) -> None:
    """Write the `new` tokens that this rank generated, and what it held, to `folder/rank<n>.json`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = graphopt.optimize(models.llama(layers), shard=dist.get_world_size(), strict=True)
    tokens = [
        model.generate(p, max_new_tokens=new, do_sample=False, cache_implementation="static")[
            0
        ].tolist()
        for p in models.prompts(2)
    ]  # fmt: skip
    report = backend.reports()[-1]
    result = {
        "tokens": tokens,
        "bytes": graphopt.weight_bytes(model),
        "all_reduces": report.counts.get("all_reduce", 0),
        "fallbacks": [r.fallback for r in backend.reports() if r.fallback],
    }
    (Path(folder) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
