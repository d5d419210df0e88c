#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Everything that wants a GPU, in one command of less than 9 minutes and without a network:
#
#     bash benchmarks/gpu_suite.sh OUTDIR
#
# builds, runs the tests on CUDA, measures (gpu_suite.py), and runs compute-sanitizer where there is one. A step that fails
# or takes too long is noted, and the rest goes on. OUTDIR gets results.json, table.md, chart.png, suite.json, steps.txt and
# a log a step. Needs torch >= 2.11 with CUDA, torchvision, pytest, ninja, pybind11, matplotlib and nvcc.
#
# PYTHON (python3), TORCH_CUDA_ARCH_LIST (9.0), MAX_JOBS (all cores), GPU_SUITE_SECONDS (520).
set -uo pipefail
out=${1:?usage: bash benchmarks/gpu_suite.sh OUTDIR}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.."
root=$(pwd)
python=${PYTHON:-python3}
limit=${GPU_SUITE_SECONDS:-520}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}"
: > "$out/steps.txt"
failed=0

# step NAME SECONDS KEEP COMMAND...: runs it for at most SECONDS, and so that KEEP seconds are left for what follows.
step() {
  local name=$1 most=$2 keep=$3 begin=$SECONDS code
  shift 3
  local left=$((limit - SECONDS - keep))
  if ((left < 5)); then
    echo "$name: skipped, no time left" | tee -a "$out/steps.txt"
    return 1
  fi
  timeout --kill-after=5 "$((left < most ? left : most))" "$@" > "$out/$name.log" 2>&1
  code=$?
  if ((code == 0)); then
    echo "$name: ok, $((SECONDS - begin)) s" | tee -a "$out/steps.txt"
  elif [[ $name == tests && $code == 5 ]]; then
    echo "tests: none for CUDA" | tee -a "$out/steps.txt"
  else
    failed=1
    echo "$name: failed ($code), $((SECONDS - begin)) s, see $name.log" | tee -a "$out/steps.txt"
    tail -n 15 "$out/$name.log"
  fi
  return "$code"
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
# In place, not by pip: pip builds in a temporary folder, this keeps the objects for the next run.
NVCC_APPEND_FLAGS="-Xptxas=-v" DYNCONV_CUDA=1 step build 260 200 "$python" setup.py build_ext --inplace
# Those of the kernels on the emulation run on the CPU.
step tests 90 180 "$python" -m pytest tests/test_*conv2d_cuda.py -q -k "not test_kernels" -p no:cacheprovider
deform=deform:small,deform:all_different,deform:depthwise,deform:several_tiles
dynamic=dynamic:small,dynamic:all_different,dynamic:depthwise,dynamic:several_tiles_with_stride
step check 60 150 "$python" benchmarks/gpu_suite.py "$out" --check "$deform,$dynamic"
measure=$((limit - SECONDS - 100))
measure=$((measure > 280 ? 280 : measure))
step measure "$((measure + 20))" 0 "$python" benchmarks/gpu_suite.py "$out" --seconds "$measure"
if command -v compute-sanitizer > /dev/null; then
  # An allocation a tensor, so that a step beyond one is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # Ours alone, where the tool can choose: instrumenting torch's kernels takes longer than running ours.
  ours=()
  if compute-sanitizer --help 2>&1 | grep -q -e --kernel-regex; then ours=(--kernel-regex kns=dynconv); fi
  step memcheck 60 20 compute-sanitizer --tool memcheck "${ours[@]}" --error-exitcode 9 \
    "$python" benchmarks/gpu_suite.py "$out" --check deform:small,dynamic:small,deform:pointwise,dynamic:pointwise
  step racecheck 60 0 compute-sanitizer --tool racecheck "${ours[@]}" --error-exitcode 9 \
    "$python" benchmarks/gpu_suite.py "$out" --check deform:small,dynamic:small
else
  echo "memcheck, racecheck: skipped, no compute-sanitizer" | tee -a "$out/steps.txt"
fi
{ printf '\n### Steps\n\n'; sed 's/^/- /' "$out/steps.txt"; } >> "$out/table.md"
cat "$out/table.md"
exit "$failed"
