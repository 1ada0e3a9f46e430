"""The demo's models, eager against graphopt: one decode step and one page through the encoder.

    python -m bench.bench_models [--turns 21] [--threads 1] [--inductor]

Results are compared before anything is timed. Interleaved turns, medians. One thread and its CPU time, unless
asked for more, which are timed by the wall clock: on a shared machine that measures the scheduler. The copy
bandwidth is measured in the same run: a decode step reads every weight once and can do no better.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench import record
from graphopt.backend import clear_reports, reports
from graphopt.tools import demo_models as models
from graphopt.tools.demo_clock import compare, threads
from graphopt.tools.demo_watch import calls_in, operators, watched_step
from tests.tolerances import LARGEST_OUTPUT

COPIED = 256 << 20  # bytes: several times the last-level cache


@dataclass(frozen=True)
class Pair:
    """The same work, unmodified and compiled; each returns its result."""

    backend: str
    eager: Callable[[], torch.Tensor]
    ours: Callable[[], torch.Tensor]

    def check(self) -> float:
        """The largest difference over the largest output. Raises SystemExit where it is too large."""
        expected, got = self.eager(), self.ours()
        assert self.backend != "graphopt" or reports(), "the backend was never called"
        difference = float((expected - got).abs().max() / expected.abs().max())
        if not difference <= LARGEST_OUTPUT:
            allowed = f"allowed is {LARGEST_OUTPUT:.0e}"
            raise SystemExit(f"results differ by {difference:.1e} of the largest, {allowed}")
        return difference


def decode(backend: str, options: dict[str, object] | None) -> Pair:
    """One token after a prompt; each side has its own static cache, set back before each step."""
    model, prompt = models.llama(), models.prompts(1)[0]
    mask = torch.ones(1, models.PROMPT + 1, dtype=torch.long)

    def stepper(call: Callable[..., object]) -> Callable[[], torch.Tensor]:
        cache = models.cache_after(model, prompt)

        def step() -> torch.Tensor:
            for layer in cache.layers:
                layer.cumulative_length.fill_(models.PROMPT)
            with torch.no_grad():
                return call(input_ids=prompt[:, :1], attention_mask=mask, past_key_values=cache).logits  # type: ignore[attr-defined]

        return step

    compiled = torch.compile(model, backend=backend, options=options)  # type: ignore[call-overload]
    return Pair(backend, stepper(model), stepper(compiled))


def encode(backend: str, options: dict[str, object] | None) -> Pair:
    """The page through the encoder's transformer as one padded batch, without tokenization and pooling."""
    encoder = models.encoder()
    model: nn.Module = encoder[0].model
    given = encoder.preprocess(models.sentences())
    given = {name: given[name] for name in ("input_ids", "attention_mask")}

    def forward(call: Callable[..., object]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                hidden = call(**given).last_hidden_state  # type: ignore[attr-defined]
            return hidden * given["attention_mask"][..., None]

        return run

    compiled = torch.compile(model, backend=backend, options=options)  # type: ignore[call-overload]
    return Pair(backend, forward(model), forward(compiled))


def copy_bandwidth(clock: Callable[[], float], turns: int = 7) -> float:
    """GB/s of a large copy, reads and writes counted."""
    source = torch.rand(COPIED // 4)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)
    return 2 * COPIED / min(compare(copy, copy, turns=turns, clock=clock).a) / 1e9


def step_bytes() -> int:
    """Bytes of weights that a decode step reads: all but the embedding, of which it reads one row."""
    model = models.llama()
    embedding = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)


def layer_calls() -> dict[str, object]:
    """Calls of a decoder layer before and after, and operators that a decode step runs."""
    model = models.llama()
    watched, token = watched_step(model)
    middle = f"model.layers.{models.LAYERS // 2}"
    stages = {stage: calls_in(watched.graphs[stage], middle) for stage in ("captured", "lower")}
    return {
        "layer": {stage: {"calls": c.total, "views": c.views} for stage, c in stages.items()},
        "operators": {"eager": operators(lambda: model(**token)), "graphopt": operators(watched.again)},
    }


def measure(turns: int, inductor: bool) -> dict[str, object]:
    """All figures; times in milliseconds, bandwidth in GB/s."""
    sides: list[tuple[str, dict[str, object] | None]] = [("graphopt", {"strict": True})]
    if inductor:
        sides.append(("inductor", None))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rows: list[dict[str, object]] = []
    calls, megabytes = layer_calls(), step_bytes() / 1e6
    for work, make in (("decode step", decode), ("encoder, a page of 40 sentences", encode)):
        for backend, options in sides:
            torch.compiler.reset()
            clear_reports()
            pair = make(backend, options)
            difference = pair.check()
            turned = compare(pair.eager, pair.ours, turns=turns, clock=clock)
            eager, ours = (1000 * s for s in turned.seconds)
            row = {"work": work, "backend": backend, "difference": float(f"{difference:.1e}")}
            row |= {"eager": round(eager, 2), "ours": round(ours, 2), "speedup": round(turned.speedup, 2)}
            if make is decode:
                row["gigabytes_per_second"] = round(megabytes / ours, 1)
            rows.append(row)
            print(row, flush=True)
    return {
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if clock is time.process_time else "wall clock",
        "turns": turns,
        "copy": round(copy_bandwidth(clock), 1),
        "step_megabytes": round(megabytes, 1),
        "calls": calls,
        "rows": rows,
    }


def main() -> None:
    """Measure, print and write `results/models.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inductor", action="store_true", help="compare Inductor's default with eager, too")
    given = parser.parse_args()
    with threads(given.threads):
        result = measure(given.turns, given.inductor)
    path = record.write("models", result)
    print({name: value for name, value in result.items() if name != "rows"})
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
