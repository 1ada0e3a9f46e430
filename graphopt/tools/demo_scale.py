"""The demo's second half: the Llama in int8, over two processes, and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.padding import Padding

from graphopt import backend
from graphopt.ops.quantized import dequantized, pack_int8, scales_int8
from graphopt.tools import demo_models as models
from graphopt.tools.compile import compile_for
from graphopt.tools.demo_show import Show

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GROUP = 64
EXACT = 1e-4  # of the logits' standard deviation (near 1): both sides round differently, in fp32
PACKED = 0.28  # of fp32: a byte a weight, and a scale for each group
LOSSY = 0.05  # of the logits' standard deviation: half a step of a group's 127, over 8 layers
RANKS = 2
TARGET = "cuda:90"
LAUNCHES = 8  # of a decoder layer


def smaller(show: Show) -> None:
    """int8 weights: how many bytes are left, and what it costs in accuracy."""
    show.title("3  The same Llama with int8 weights, in groups of 64")
    plain, ours, reference = models.llama(), models.llama(), fake_quantized(models.llama())
    prompt = models.prompts(1)[0]
    torch.compiler.reset()
    backend.clear_reports()
    compiled = torch.compile(ours, backend="graphopt", options={"strict": True, "quantize": "int8"})
    with torch.no_grad():
        found = compiled(prompt, use_cache=False).logits
        exact, rounded = (m(prompt, use_cache=False).logits for m in (plain, reference))
    (report,) = backend.reports()
    before, after = report.quantized_bytes
    text = f"{report.quantized} weights: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.1%})"
    show.check("bytes", 0 < after <= PACKED * before, text)
    error = float((found - rounded).abs().max() / exact.std())
    text = f"at most {error:.1e} of their deviation from the model with fake-quantized weights, in eager"
    show.check("logits", error <= EXACT, text)
    loss = float((found - exact).pow(2).mean().sqrt() / exact.std())
    kept = float((found.argmax(-1) == exact.argmax(-1)).float().mean())
    text = f"{loss:.1%} of their deviation from the fp32 model's (rms); {kept:.0%} of its greedy tokens"
    show.check("int8", loss <= LOSSY, text)


def fake_quantized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with each linear's weight replaced by what its int8 form stands for."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scales = scales_int8.reference(module.weight, GROUP)
            module.weight.data = dequantized(pack_int8.reference(module.weight, scales), scales)
    return model


def ranks(show: Show) -> None:
    """Two processes with half of the weights each; the same tokens as one."""
    show.title(
        f"4  The same Llama over {RANKS} processes (torchrun, gloo): graphopt.optimize(model, shard={RANKS})"
    )
    model = models.llama()
    prompts = models.prompts(2)
    expected = [
        model.generate(p, max_new_tokens=models.NEW, do_sample=False, cache_implementation="static",
                       disable_compile=True)[0].tolist()
        for p in prompts
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
            "-m", "graphopt.tools.demo_rank", folder, str(models.LAYERS), str(models.NEW),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        seconds = time.perf_counter() - start
        files = sorted(Path(folder).glob("rank*.json"))
        found = [json.loads(file.read_text()) for file in files]
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    show.check("processes", len(found) == RANKS, f"{len(found)} ran, in {seconds:.0f} s" if found else last)
    if not found:
        return
    same = sum(tokens == expected for tokens in (rank["tokens"] for rank in found))
    text = f"{len(prompts)} x {models.NEW} tokens on each rank; on {same} of {RANKS} ranks they are eager's"
    show.check("tokens", same == RANKS, text)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    share = max(rank["bytes"] for rank in found) / whole
    text = ", ".join(f"rank {i}: {rank['bytes'] / 1e6:.0f} MB" for i, rank in enumerate(found))
    show.check("weights", share <= 1 / RANKS + 0.01, f"{text} of {whole / 1e6:.0f} MB")
    show.note("reduces", f"{found[0]['all_reduces']} all-reduces a step for {models.LAYERS} layers")


def elsewhere(show: Show) -> None:
    """A decode step compiled for a GPU: every kernel, in numbers, without one."""
    show.title(f"5  A decode step of the same Llama in bf16, compiled for {TARGET}; no GPU is needed")
    model = models.llama().bfloat16()
    prompt = models.prompts(1)[0]
    step = {
        "input_ids": prompt[:, :1],
        "past_key_values": models.cache_after(model, prompt),
        "use_cache": True,
    }
    torch.compiler.reset()
    found = compile_for(model, (), step, target=TARGET)
    text = f"{found.per_layer} launches in a decoder layer, {sum(found.layers.values())} in the step"
    show.check("launches", 0 < found.per_layer <= LAUNCHES, text)
    show.check("kernels", not found.references, f"{len(found.kernels)} compiled; no op is left without one")
    bad = [f"{row.name}: {', '.join(row.faults)}" for row in found.kernels if row.faults]
    show.check(
        "faults", not bad, "; ".join(bad) or "no spilled registers, no local memory, shared memory fits"
    )
    show.console.print(Padding(found, (1, 0, 0, 3)))
