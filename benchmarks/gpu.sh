#!/usr/bin/env bash
# On a machine with a GPU, torch and Triton already there: build, compile, check, measure, test, sanitize, in 9 minutes.
#   benchmarks/gpu.sh RESULTS [PYTHON]
# Writes log.txt, a CSV of times and one of kernel variants, and, where matplotlib is there, plots into RESULTS. Builds in
# place for the given Python and fetches nothing. Every step has a budget and is cut off alone; rows are written as they
# come; what fails or is cut off is said at the end, and by the exit status, and stops nothing else. The budgets add up
# to 533 s, for 16 cores. CONDENSE_COMMIT names the commit where the folder has no git history. Without a GPU the same
# steps run on the CPU as far as they can, on a few shapes and in few rounds, so that the script can be tried anywhere.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
results=${1:?usage: benchmarks/gpu.sh RESULTS [PYTHON]}
python=${2:-python3}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit
exec > >(tee "$results/log.txt") 2>&1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
has() { "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))" 2> /dev/null; }

for package in torch triton setuptools numpy pytest rich; do
  has $package && continue
  echo "$python lacks $package. Remedy: install it, or name another Python as the second argument"
  exit 1
done
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || exit
[ "$gpu" = 1 ] && patience=1 rounds=31 || patience=3 rounds=3
. benchmarks/steps.sh

echo "commit $(git rev-parse --short HEAD 2> /dev/null || echo "${CONDENSE_COMMIT:-unknown}")"
start 80 "build" env CONDENSE_BUILD_EXT=1 "$python" setup.py -q build_ext --inplace
start 80 "fill Triton's cache" "$python" benchmarks/fill_cache.py
finish
step 10 "what is here" "$python" -m condense_kernels env
step 25 "checks" "$python" benchmarks/checks.py

csv=$results/times.csv
flagship=(overhead llava15-64 llava15-192) attention=(llava15-192)
[ "$gpu" = 1 ] && flagship=(llava15-64 llava15-192 llava-next-global overhead llava15-128 llava15-192-projected \
  llava15-64-batch8 llava-next-crops onevision video-128 long-16384) attention=(llava15-192 llava-next-global onevision)
step 95 "time select_and_merge" "$python" benchmarks/bench_select_and_merge.py \
  --shapes "${flagship[@]}" --rounds $rounds --csv "$csv"
if [ "$gpu" = 1 ]; then
  step 35 "kernel variants" "$python" benchmarks/variants.py --csv "$results/variants.csv"
else
  left_out "kernel variants" "no GPU"
fi
for op in similarity greedy_select assign merge merge_backward; do
  step 17 "time $op" "$python" benchmarks/bench_$op.py --shapes llava15-192 --rounds $rounds --csv "$csv"
done
step 20 "time attention_scores" "$python" benchmarks/bench_attention_scores.py \
  --shapes "${attention[@]}" --rounds $rounds --csv "$csv"
step 20 "time select_and_merge_varlen" "$python" benchmarks/bench_select_and_merge_varlen.py \
  --shapes llava-next-crops tiny-4096 --rounds $rounds --csv "$csv"
if [ "$gpu" = 1 ]; then
  step 30 "sweeps of N, K and B" "$python" benchmarks/bench_select_and_merge.py --sweeps --rounds 11 --csv "$csv"
else
  left_out "sweeps of N, K and B" "no GPU"
fi
step 5 "targets" "$python" benchmarks/targets.py "$csv"
if has matplotlib; then
  step 8 "plots" "$python" benchmarks/plot.py "$csv" "$results"
else
  left_out "plots" "no matplotlib; python benchmarks/plot.py times.csv FOLDER draws them elsewhere"
fi

pytest=("$python" -m pytest -q -p no:cacheprovider -p no:randomly --disable-warnings)
has xdist && pytest+=(-n "$(nproc)" --maxprocesses 16)
if [ "$gpu" = 1 ]; then
  step 70 "tests on the GPU" "${pytest[@]}" tests/test_gpu.py tests/test_triton_varlen.py tests/test_triton_gradients.py \
    tests/test_triton_attention.py
else
  left_out "tests on the GPU" "no GPU"
fi

watched=(benchmarks/checks.py --without graph)
if [ "$gpu" = 1 ] && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    [ $tool = initcheck ] && watched+=(packed varlen) # which load what nobody wrote, and use none of it
    start 50 "compute-sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
      --report-api-errors no --print-limit 20 --error-exitcode 1 "$python" "${watched[@]}"
  done
else
  left_out "compute-sanitizer" "no GPU, or no such command"
fi
if [ "$gpu" = 1 ] && has triton.experimental.gsan; then # races in global memory
  start 50 "Triton's gsan" env TRITON_INSTRUMENTATION_MODE=gsan "$python" benchmarks/checks.py --without graph --gsan
else
  left_out "Triton's gsan" "no GPU, or a Triton without it"
fi
finish
summary
