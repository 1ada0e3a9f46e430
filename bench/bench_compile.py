"""Decode steps compiled for every GPU target, without a GPU: launches of a layer, and the kernels in numbers.

    python -m bench.bench_compile

Layers of true sizes, bf16, one token on a static cache of 4096; no weights (the meta device), two layers. It
says what would be launched and what the compilers made of it; how fast that is only a GPU can say.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import torch
import transformers
from torch import nn

from bench import record
from graphopt.aot import default_cache
from graphopt.targets import TARGETS
from graphopt.tools.compile import Compilation, compile_for

LENGTH = 4096
LAYERS = 2  # all are alike; the first reads the embedding
SHARED = {"num_hidden_layers": LAYERS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "Llama 3.2 1B": transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=8192, **SHARED,
    ),
    "Llama 3.1 8B": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, max_position_embeddings=8192, **SHARED,
    ),
    "Qwen3 4B": transformers.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=8192, **SHARED,
    ),
    "Gemma 2 2B": transformers.Gemma2Config(
        hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        vocab_size=256000, sliding_window=4096, max_position_embeddings=8192, **SHARED,
    ),
    "GPT-2": transformers.GPT2Config(n_layer=LAYERS, n_positions=8192),
}  # fmt: skip


def step(config: transformers.PretrainedConfig) -> tuple[nn.Module, dict[str, object]]:
    """A model without weights, and the arguments of one decode step."""
    with torch.device("meta"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
        past = transformers.StaticCache(config=config, max_cache_len=LENGTH)
        prompt = torch.zeros(1, 128, dtype=torch.long)
        model(prompt, past_key_values=past, use_cache=True)
        return model, {"input_ids": prompt[:, :1], "past_key_values": past, "use_cache": True}


def row(name: str, target: str, found: Compilation) -> dict[str, object]:
    """One row of the table; the full list of kernels is kept beside it."""
    return {
        "model": name,
        "target": target,
        "launches_per_layer": found.per_layer,
        "outside": found.layers.get("", 0),
        "kernels": len(found.kernels),
        "references": found.references,
        "most_registers": max(k.compiled.registers for k in found.kernels),
        "spills": sum(k.compiled.spills + k.compiled.stack for k in found.kernels),
        "most_shared": max(k.compiled.shared for k in found.kernels),
        "faults": [f"{k.name}: {fault}" for k in found.kernels for fault in k.faults],
    }


def main() -> None:
    """Compile, print and write `results/compile.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for name, config in CONFIGS.items():
        for target in TARGETS:
            torch.compiler.reset()
            model, given = step(config)
            found = compile_for(model, (), given, target=target, cache=default_cache())
            rows.append(row(name, target, found))
            print(rows[-1], flush=True)
    made_by = {"length": LENGTH, "layers": LAYERS, "triton": version("triton")}
    record.write("compile", {**made_by, "rows": rows})


if __name__ == "__main__":
    main()
