#!/usr/bin/env bash
# On a machine with a GPU, torch and Triton already there: build, test on the GPU, then measure. Under 8 minutes.
#   benchmarks/gpu.sh RESULTS [PYTHON]
# Writes log.txt, a CSV of times and one of kernel variants, and, where matplotlib is there, plots into RESULTS.
# Builds in place for the given Python, fetches nothing, and stops with the first wrong result. Every step has a limit: a
# test that is not done by then is a failure, a measurement is cut off and what it has is kept. CONDENSE_COMMIT names the
# commit where the folder has no git history. Without a GPU the same steps run on the CPU as far as they can, on a few
# shapes and in few rounds, so that the script itself can be tried anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: benchmarks/gpu.sh RESULTS [PYTHON]}
python=${2:-python3}
mkdir -p "$results"
results=$(cd "$results" && pwd)
exec > >(tee "$results/log.txt") 2>&1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

step() { # SECONDS WHAT COMMAND ...
  local limit=$1 what=$2 began=$SECONDS left status=0
  shift 2
  [ "$cut_off" = fine ] && left=$((400 - SECONDS)) || left=$((470 - SECONDS)) # the last steps come after measuring
  ((limit < left)) || limit=$left
  ((limit > 0)) || limit=1
  printf '\n== %s (at most %s s)\n' "$what" "$limit"
  timeout "$limit" "$@" || status=$?
  if [ "$status" -eq 124 ] && [ "$cut_off" = fine ]; then
    echo "CUT OFF: $what: what was measured in $limit s is kept"
  elif [ "$status" -ne 0 ]; then
    [ "$status" -eq 124 ] && echo "FAILED: $what: not done after $limit s" || echo "FAILED: $what: exit status $status"
    exit "$status"
  fi
  echo "-- $((SECONDS - began)) s"
}
cut_off=wrong # of steps that test; those that only measure may be cut off
pytest=("$python" -m pytest -q -p no:cacheprovider -p no:warnings)

"$python" - << 'PY'
import importlib.util, sys
missing = [name for name in ("torch", "triton", "setuptools", "numpy", "pytest", "rich") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}. Remedy: install them, or name another Python as the second argument")
PY
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')

step 120 "build" env CONDENSE_BUILD_EXT=1 "$python" setup.py -q build_ext --inplace
echo "commit $(git rev-parse --short HEAD 2> /dev/null || echo "${CONDENSE_COMMIT:-unknown}")"
step 60 "what is here" "$python" -m condense_kernels env

step 90 "the suite itself: gates, baselines, rows" "${pytest[@]}" tests/test_benchmarks.py \
  -k "not memory and not pictures and not make_bench"
step 150 "results against the reference, compiled kernels" "${pytest[@]}" -m gpu tests/test_gpu.py \
  tests/test_triton_varlen.py
step 75 "attention scores, compiled kernels" "${pytest[@]}" tests/test_triton_attention.py \
  -k "real_models or nothing_waits or alone or (segments and 130 and bfloat16) or (reference and grouped and bfloat16)"

if [ "$gpu" = 1 ] && command -v compute-sanitizer > /dev/null; then
  if compute-sanitizer --tool memcheck "$python" -c 'import torch; torch.ones(1).cuda()' > /dev/null 2>&1; then
    for tool in memcheck racecheck; do
      step 60 "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "${pytest[@]}" tests/test_gpu.py -k "test_every_kind_of_input and 30 and float32 and (random or masked or nan)"
    done
  else
    echo "compute-sanitizer does not work on this machine: left out"
  fi
fi

if [ "$gpu" = 1 ]; then
  cut_off=fine step 90 "kernel variants" "$python" benchmarks/variants.py --csv "$results/variants.csv"
  rounds=31
else
  rounds=3
fi
csv=$results/times.csv
cut_off=fine
for op in similarity greedy_select assign merge merge_backward; do
  step 60 "time $op" "$python" benchmarks/bench_$op.py --shapes llava15-192 --rounds $rounds --csv "$csv"
done
shapes=(llava15-192)
[ "$gpu" = 1 ] && shapes=(llava15-192 llava-next-global onevision)
step 60 "time attention_scores" "$python" benchmarks/bench_attention_scores.py --shapes "${shapes[@]}" \
  --rounds $rounds --csv "$csv"
shapes=(overhead llava15-64 llava15-192)
[ "$gpu" = 1 ] && shapes=(overhead llava15-64 llava15-128 llava15-192 llava15-192-projected llava15-64-batch8 \
  llava-next-crops llava-next-global onevision video-128 long-16384)
step 150 "time select_and_merge" "$python" benchmarks/bench_select_and_merge.py --shapes "${shapes[@]}" \
  --rounds $rounds --csv "$csv"
step 60 "time select_and_merge_varlen" "$python" benchmarks/bench_select_and_merge_varlen.py \
  --shapes llava-next-crops tiny-4096 --rounds $rounds --csv "$csv"
if [ "$gpu" = 1 ]; then
  step 100 "sweeps of N, K and B" "$python" benchmarks/bench_select_and_merge.py --sweeps --rounds 11 --csv "$csv"
fi
cut_off=wrong
step 20 "targets" "$python" benchmarks/targets.py "$csv"
if "$python" -c 'import matplotlib' 2> /dev/null; then
  step 60 "plots" "$python" benchmarks/plot.py "$csv" "$results"
else
  echo "no matplotlib, no plots: python benchmarks/plot.py times.csv FOLDER draws them elsewhere"
fi
printf '\nall of it right, in %s s\n' "$SECONDS"
