#!/usr/bin/env bash
# Tests and benchmarks on a machine with one NVIDIA GPU, in under nine minutes; the most telling first.
#
#     bench/gpu.sh FOLDER
#
# Needs torch, triton, transformers and pytest; graphopt is found by PYTHONPATH, nothing is installed and nothing
# fetched. Each result is written into FOLDER as soon as it is known; one part's failure does not stop the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?usage: bench/gpu.sh FOLDER}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
failed=0

part() {  # name, most seconds, command...
    local name=$1 most=$2
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$OUT/$name.log"
    local rc=${PIPESTATUS[0]}
    echo "$name $rc ${SECONDS}s" | tee -a "$OUT/parts.txt"
    [ "$rc" -eq 0 ] || failed=1
}

# The limits' sum is 535 seconds.
part environment 40 python3 -c "
import torch, triton, transformers
print(torch.__version__, triton.__version__, transformers.__version__, torch.cuda.get_device_name())
import graphopt.defaults"
part tests_models 120 python3 -m pytest -q --maxfail=8 -m gpu tests/gpu/test_models_gpu.py
part kernels 115 python3 -m bench.gpu_kernels --folder "$OUT" --seconds 95
part warm 65 python3 -m tests.gpu.warm cuda:90
part tests_kernels 105 python3 -m pytest -q --maxfail=20 -m gpu tests/gpu/test_kernels_gpu.py
part models 90 python3 -m bench.gpu_models --folder "$OUT" --seconds 60
exit $failed
