#!/usr/bin/env bash
# On a machine with a GPU, torch and Triton already there: build, test on the GPU, then measure.
#   benchmarks/gpu.sh RESULTS [PYTHON]
# Builds in place for the given Python, which needs torch, triton, setuptools, pytest, hypothesis, rich, einops and numpy
# and keeps them as they are; stops with the first wrong result.
# Without a GPU the same steps run on the CPU as far as they can, so that the script itself can be tried anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: benchmarks/gpu.sh RESULTS [PYTHON]}
python=${2:-python3}
mkdir -p "$results"
exec > >(tee "$results/log.txt") 2>&1

step() { printf '\n== %s\n' "$*"; }

step "build"
CONDENSE_BUILD_EXT=1 "$python" setup.py build_ext --inplace
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
echo "commit $commit"
"$python" -c "import hypothesis, pytest, rich, setuptools, triton"
"$python" -m condense_kernels env

step "results against the reference, compiled kernels"
"$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py

step "what the compiler made of the kernels"
"$python" -m pytest -q -s -p no:cacheprovider tests/test_compile_targets.py

if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
      tests/test_gpu.py -k "test_every_kind_of_input and 30 and (random or masked or nan)"
  done
fi

step "time"
"$python" benchmarks/bench_select_and_merge.py --csv "$results/select_and_merge.csv"
