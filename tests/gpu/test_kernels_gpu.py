"""Every GPU kernel on a GPU: against its reference in every dtype, at real sizes, and replayed from a graph.

`python -m tests.gpu.warm` compiles what these tests launch on all cores; without it they compile one by one.
"""

from __future__ import annotations

import pytest
import torch

from graphopt.kernel import Case, Kernel
from tests.kernel_check import GPU_KERNELS, check, copy_once, op_of, outcome, refusal, tensors, written
from tests.tolerances import close

pytestmark = pytest.mark.gpu

# Half precision first: it is what a GPU is for, and a run may be cut short.
CASES = [
    pytest.param(k, c, d, id=f"{k.name}-{c.name}-{str(d).removeprefix('torch.')}")
    for d in (torch.bfloat16, torch.float16, torch.float32)
    for k in GPU_KERNELS
    for c in k.cases
]
REAL = [pytest.param(k, c, id=f"{k.name}-{c.name}") for k in GPU_KERNELS for c in k.must_accept]


def first_real_result(kernel: Kernel) -> Case:
    """A kernel's first case that it runs in bf16 and that computes something."""
    accepted = [c for c in kernel.cases if refusal(kernel, c, torch.bfloat16) is None]
    return next(c for c in accepted if all(t.numel() for t in tensors(c.make(torch.bfloat16))))


@pytest.mark.parametrize("kernel", GPU_KERNELS, ids=lambda k: k.name)
def test_kernel_is_replayed_from_a_graph_on_new_inputs(kernel: Kernel) -> None:
    case, places = first_real_result(kernel), written(op_of(kernel))
    held, fresh = (case.make(torch.bfloat16, "cuda", seed) for seed in (0, 1))
    kernel.launch(*held)  # compiled and loaded: no capture may do that
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outcome(kernel.launch, held, places)
    for into, values in zip(held, fresh, strict=True):
        if isinstance(into, torch.Tensor) and isinstance(values, torch.Tensor):
            copy_once(into, values)
    graph.replay()
    torch.cuda.synchronize()
    expected = outcome(kernel.launch, fresh, places)
    assert list(tensors(expected))
    for mine, direct in zip(tensors(found), tensors(expected), strict=True):
        close(mine, direct, torch.bfloat16)


def test_split_attention_counts_anew_at_each_replay_and_on_each_stream() -> None:
    kernel = next(k for k in GPU_KERNELS if k.name == "attention_split_triton")
    case = next(c for c in kernel.must_accept if c.name == "decode 128")
    given = [case.make(torch.bfloat16, "cuda", seed) for seed in (0, 1)]
    expected = [outcome(kernel.launch, g, ())[0] for g in given]
    torch.cuda.synchronize()
    graphs, found = [torch.cuda.CUDAGraph() for _ in given], []
    for graph, held in zip(graphs, given, strict=True):
        with torch.cuda.graph(graph):
            found.append([outcome(kernel.launch, held, ())[0] for _ in range(3)])
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for results, direct in zip(found, expected, strict=True):
        for result in results:
            for mine, theirs in zip(tensors(result), tensors(direct), strict=True):
                close(mine, theirs, torch.bfloat16)


@pytest.mark.parametrize(("kernel", "case", "dtype"), CASES)
def test_kernel_computes_what_its_reference_does(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    if refusal(kernel, case, dtype) is None:
        check(kernel.launch, op_of(kernel), case, dtype, "cuda")


@pytest.mark.parametrize(("kernel", "case"), REAL)
def test_kernel_is_right_at_the_sizes_of_models(kernel: Kernel, case: Case) -> None:
    check(kernel.launch, op_of(kernel), case, torch.bfloat16, "cuda", reference="cuda")
    torch.cuda.empty_cache()
