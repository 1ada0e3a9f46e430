"""Results of benchmarks: one JSON file each in `bench/results`, with the machine that they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from graphopt.tools.demo_clock import processor

RESULTS = Path(__file__).parent / "results"


def write(name: str, result: Mapping[str, object], folder: Path = RESULTS) -> Path:
    """Write `<name>.json` into the results and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def read(name: str) -> dict:
    """What `write` wrote. FileNotFoundError names the command that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        command = "make zoo" if name == "zoo" else f"python -m bench.bench_{name}"
        raise FileNotFoundError(f"{path} is missing; run {command}")
    return json.loads(path.read_text())


def told(error: Exception) -> str:
    """An error in one line, for a row of results: Dynamo's begin with a line that says nothing."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def machine() -> dict[str, str]:
    """What a number means nothing without."""
    found = {
        "processor": processor(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "triton": version("triton")}
    return found
