"""Time of the rewrite passes on a deep, narrow Llama: per 1000 nodes, and for each further identical layer.

    python -m bench.bench_passes [--rounds 7]

CPU time of one thread: compilation is Python, and the machine may be shared. The models take turns, so that
a busy moment hits all; medians are kept. What Dynamo and our capture take before the passes, and the tracing
of the rules at their first use in a process, are shown beside the passes and not in them.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import fx

from bench import record
from graphopt import defaults, torch_private
from graphopt.capture import Captured, from_dynamo
from graphopt.graph import copy_graph
from graphopt.tools.demo_clock import threads

LAYERS = (4, 8, 16, 32)
REWRITES = ("canonicalize", "recognise", "merge")  # lowering is no rewriting by rules; it has its own column
MARK_1000, MARK_LAYER = 100.0, 40.0  # ms of CPU time


@dataclass(frozen=True)
class Subject:
    """A model's captured graph, and the seconds (CPU) that Dynamo and our capture took for it."""

    layers: int
    captured: Captured
    dynamo: float
    capture: float

    @property
    def nodes(self) -> int:
        """The size that everything is measured by."""
        return len(self.captured.gm.graph.nodes)


def subject(layers: int) -> Subject:
    """A tiny Llama of that depth, as the backend gets it: a padded batch of two prompts."""
    config = transformers.LlamaConfig(
        hidden_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(3, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    found: list[Subject] = []
    start = time.process_time()

    def backend(gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        entered = time.process_time()
        captured = from_dynamo(gm, examples)
        found.append(Subject(layers, captured, entered - start, time.process_time() - entered))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(ids, attention_mask=mask, use_cache=False)
    (only,) = found
    return only


def passes(captured: Captured) -> dict[str, float]:
    """Seconds of CPU time of each pass of the default pipeline, on a copy of the graph."""
    context = defaults.context()
    gm = torch_private.lazy_module(captured.gm, copy_graph(captured.gm.graph))  # as the pipeline does
    gm.meta.update(captured.gm.meta)
    gc.collect()
    gc.freeze()  # the other subjects' graphs, 1 GB of small objects, are not to be searched for garbage
    seconds: dict[str, float] = {}
    for step in defaults.pipeline().passes:
        start = time.process_time()
        step.run(gm, context)
        seconds[step.name] = time.process_time() - start
    gc.unfreeze()
    return seconds


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares line's rise."""
    return statistics.linear_regression(x, y).slope


def against(milliseconds: float, mark: float) -> dict[str, object]:
    """A time and the most that it may be."""
    return {"milliseconds": round(milliseconds, 1), "mark": mark, "met": milliseconds <= mark}


def measure(rounds: int) -> dict[str, object]:
    """All figures, times in milliseconds."""
    subjects = [subject(layers) for layers in LAYERS]
    first = sum(passes(subjects[0].captured).values())
    times: dict[int, dict[str, list[float]]] = {s.layers: defaultdict(list) for s in subjects}
    for _ in range(rounds):
        for s in subjects:
            for name, seconds in passes(s.captured).items():
                times[s.layers][name].append(1000 * seconds)
    medians = {n: {name: statistics.median(ms) for name, ms in t.items()} for n, t in times.items()}
    rewriting = {n: sum(t[name] for name in REWRITES) for n, t in medians.items()}
    nodes = {s.layers: s.nodes for s in subjects}
    deep = subjects[-1]
    per_1000 = 1000 * rewriting[deep.layers] / deep.nodes
    layer = slope(LAYERS, [rewriting[n] for n in LAYERS])
    growth = slope([math.log(nodes[n]) for n in LAYERS], [math.log(rewriting[n]) for n in LAYERS])
    return {
        "rules": len(defaults.RULES),
        "rounds": rounds,
        "nodes": nodes,
        "milliseconds": {n: {k: round(v, 1) for k, v in t.items()} for n, t in medians.items()},
        "rewriting": {n: round(v, 1) for n, v in rewriting.items()},
        "per_1000_nodes": against(per_1000, MARK_1000),
        "further_layer": against(layer, MARK_LAYER),
        "growth_exponent": round(growth, 2),
        "first_use": round(1000 * first - sum(medians[subjects[0].layers].values())),
        "dynamo": {s.layers: round(1000 * s.dynamo) for s in subjects},
        "capture": {s.layers: round(1000 * s.capture) for s in subjects},
    }


def main() -> None:
    """Measure, print and write `results/passes.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    with threads(1):
        result = measure(parser.parse_args().rounds)
    path = record.write("passes", result)
    for name, value in result.items():
        print(f"{name:<16} {value}")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
