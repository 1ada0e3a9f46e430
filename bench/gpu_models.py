"""Decoding on a GPU: a Llama of 1B weights, one sequence, eager against graphopt in bf16 and int8.

    python -m bench.gpu_models [--folder DIR] [--layers 16] [--inductor] [--seconds 200]

The logits of a step are compared with eager's before anything is timed. A decode step reads every weight
once: bytes over the copy bandwidth of the same run is the least it can take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

from bench import record
from bench.gpu_clock import copy_bandwidth
from graphopt import backend
from tests.tolerances import BF16_LOGITS

PROMPT, ROOM = 128, 2048
BLOCK = 16  # steps timed together: one event pair
SIZES = {  # Llama 3.2 1B
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": ROOM,
}  # fmt: skip

Step = Callable[[], torch.Tensor]


def llama(layers: int) -> nn.Module:
    """Random weights of unit gain, so that logits mean something."""
    config = transformers.LlamaConfig(
        **SIZES, num_hidden_layers=layers, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def stepper(model: nn.Module, call: Callable[..., object]) -> Step:
    """Decode one token after the other on a static cache of its own that holds a prompt; gives the logits."""
    past = transformers.StaticCache(config=model.config, max_cache_len=ROOM)
    generator = torch.Generator("cuda").manual_seed(1)
    prompt = torch.randint(3, SIZES["vocab_size"], (1, PROMPT), device="cuda", generator=generator)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=past, use_cache=True)
    token = prompt[:, -1:].clone()

    def step() -> torch.Tensor:
        with torch.no_grad():
            logits = call(input_ids=token, past_key_values=past, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        return logits

    return step


def milliseconds(step: Step, steps: int = BLOCK) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def weight_bytes(model: nn.Module, quantized: bool) -> float:
    """Bytes of weights that a step reads: the tied embedding once, as the head."""
    total = 0.0
    for parameter in model.parameters():
        per = (1 + 2 / 64) if quantized and parameter.dim() > 1 else parameter.element_size()
        total += parameter.numel() * per
    return total


def measure(
    model: nn.Module, options: dict[str, object] | None, name: str, bandwidth: float, turns: int
) -> dict[str, object]:
    """One row: ours (or another backend) against eager, in turns."""
    torch.compiler.reset()
    start = time.monotonic()
    if options is None:
        call: Callable[..., object] = torch.compile(model, mode="reduce-overhead")
    else:
        call = torch.compile(model, backend=backend.graphopt, options={"strict": True, **options})
    eager, ours = stepper(model, model), stepper(model, call)
    expected, found = eager().float(), ours().float()
    first = time.monotonic() - start
    distance = float((expected - found).std() / expected.std())
    for step in (eager, ours):
        milliseconds(step, 4)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            times[i].append(milliseconds((eager, ours)[i]))
    a, b = map(statistics.median, times)
    quantized = bool(options and options.get("quantize"))
    least = weight_bytes(model, quantized) / bandwidth * 1e3
    return {
        "name": name,
        "eager": round(a, 3),
        "ours": round(b, 3),
        "speedup": round(statistics.median(x / y for x, y in zip(*times, strict=True)), 2),
        "tokens_per_second": round(1e3 / b, 1),
        "least": round(least, 3),
        "share_of_bandwidth": round(least / b, 3),
        "distance": round(distance, 4),
        "first_call_seconds": round(first, 1),
    }


def main() -> None:
    """Measure row by row; `gpu_models.json` grows with each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=200.0, help="start no row after that")
    parser.add_argument("--inductor", action="store_true", help="Inductor with CUDA graphs, too")
    given = parser.parse_args()
    start = time.monotonic()
    bandwidth = copy_bandwidth()
    model = llama(given.layers)
    sides: list[tuple[str, dict[str, object] | None]] = [
        ("graphopt, bf16", {}),
        ("graphopt, int8", {"quantize": "int8"}),
        ("graphopt, bf16, no CUDA graph", {"cuda_graphs": False}),
    ]
    if given.inductor:
        sides.append(("Inductor, reduce-overhead", None))
    rows: list[dict[str, object]] = []
    failed = False
    for name, options in sides:
        if time.monotonic() - start > given.seconds:
            print(f"no time for {name}")
            continue
        try:
            row = measure(model, options, name, bandwidth, given.turns)
            exact = not (options and options.get("quantize"))
            if exact and not row["distance"] <= BF16_LOGITS:
                failed, row = True, {**row, "wrong": f"distance {row['distance']} > {BF16_LOGITS}"}
        except Exception as error:  # the other rows are worth as much
            failed, row = True, {"name": name, "error": record.told(error)}
        rows.append(row)
        print(row, flush=True)
        result = {"layers": given.layers, "sizes": SIZES, "copy": round(bandwidth / 1e9), "rows": rows}
        record.write("gpu_models", result, given.folder)
    if failed:
        raise SystemExit("some rows failed")


if __name__ == "__main__":
    main()
