#!/usr/bin/env bash
# Everything that takes a GPU, in one call of at most 10 minutes on one card:
#
#     benchmarks/gpu_check.sh [FOLDER]
#
# builds the extension from a copy of this checkout with the torch that is there, runs the GPU tests, compute-sanitizer,
# the benchmark and ncu, and writes logs, summary.txt and summary.json to FOLDER, which is
# benchmarks/results/<the card's name> if left out. Nothing is installed. It takes torch with CUDA, safetensors, numpy, tqdm,
# setuptools, ninja, nvcc of torch's CUDA version; for the tests pytest (with pytest-xdist four at a time; those of the
# Trainer take transformers), for the pictures matplotlib.
#
# Each stage passes, fails, runs out of its time, or is skipped with the reason: without a GPU the extension is built
# for the CPU and what takes a GPU is skipped. Exit status: 0, or 1 if a stage failed or ran out of time.
#
# Environment: PYTHON (python3), MAX_JOBS (as many as cores), CUDA_VISIBLE_DEVICES (0), GPU_CHECK_BUDGET (580: seconds
# for all), GPU_CHECK_LIMIT (seconds that no stage may exceed).
set -u -o pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
budget=${GPU_CHECK_BUDGET:-580}
ceiling=${GPU_CHECK_LIMIT:-$budget}
export MAX_JOBS=${MAX_JOBS:-$(nproc)} CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

# ---- the machine ----

ask_card() { nvidia-smi --id="${CUDA_VISIBLE_DEVICES%%,*}" --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }
ask_torch() { "$python" -c "import torch; print($1)" 2>/dev/null | tail -n 1; }

card=$(ask_card name) || card=""
torch=$(ask_torch torch.__version__)
no_gpu=""
if [ -z "$torch" ]; then
  no_gpu="torch cannot be imported by $python"
elif [ -z "$card" ]; then
  no_gpu="no GPU: nvidia-smi finds none"
elif [ "$(ask_torch 'torch.cuda.is_available()')" != True ]; then
  no_gpu="torch $torch finds no CUDA device: install a CUDA build of torch that fits the driver"
fi
folder_name=$(printf '%s' "${card:-no_gpu}" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '_' | sed 's/^_*//; s/_*$//')
out=${1:-$root/benchmarks/results/$folder_name}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# ---- stages ----

names=() outcomes=() seconds=() reasons=()
record() { # NAME OUTCOME SECONDS REASON
  names+=("$1") outcomes+=("$2") seconds+=("$3") reasons+=("$4")
  printf '%-22s %-9s %4s s  %s\n' "$1" "$2" "$3" "$4"
}
skip() { record "$1" skipped 0 "$2"; }

last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | cut -c 1-200; }

# Runs a command in the copy, its output in a log, for as long as its limit and what is left of the budget allow.
stage() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 start=$SECONDS status log=$out/$1.log
  shift 2
  limit=$((limit < ceiling ? limit : ceiling))
  limit=$((limit < budget - SECONDS ? limit : budget - SECONDS))
  if ((limit <= 0)); then
    record "$name" "timed out" 0 "nothing was left of the $budget s for all"
    return 1
  fi
  (cd "$work/source" && exec timeout --kill-after=5 "$limit" "$@") >"$log" 2>&1 </dev/null
  status=$?
  case $status in
    0) record "$name" passed $((SECONDS - start)) "$(last_line "$log")" ;;
    124 | 137) record "$name" "timed out" $((SECONDS - start)) "took more than $limit s; see $name.log" ;;
    *) record "$name" failed $((SECONDS - start)) "exit status $status: $(last_line "$log")" ;;
  esac
  return $status
}

# A stage that takes a GPU, the extension and a tool.
gpu_stage() { # NAME LIMIT TOOL COMMAND...
  if [ -n "$no_gpu" ]; then
    skip "$1" "$no_gpu"
  elif [ "$built" != yes ]; then
    skip "$1" "the extension was not built"
  elif ! command -v "$3" >/dev/null; then
    skip "$1" "$3 was not found on the PATH"
  else
    stage "$1" "$2" "${@:4}"
  fi
}

copy_source() {
  mkdir "$work/source"
  (
    cd "$root" || exit
    for part in csrc ewc_fast tests setup.py pyproject.toml README.md benchmarks/gpu; do
      mkdir -p "$work/source/$(dirname "$part")"
      cp -R "$part" "$work/source/$part"
    done
  )
  rm -rf "$work"/source/ewc_fast/_C*.so "$work/source/ewc_fast/_build_info.json"
}
copy_source
echo "card: ${card:-none}; torch ${torch:-none}; results in $out"

built=no
kind=cuda
[ -z "$no_gpu" ] || kind=cpu
# egg_info: the package asks for its version.
stage build 130 env EWC_FAST_BUILD="$kind" "$python" setup.py egg_info build_ext --inplace && built=yes

has_pytest=yes
"$python" -c "import numpy, pytest" 2>/dev/null || has_pytest=no
if [ "$has_pytest" = no ]; then
  for name in selection tests-gpu; do skip "$name" "pip install pytest numpy"; done
else
  mapfile -t files < <(cd "$root" && grep -rlE 'mark\.gpu' --include='test_*.py' tests)
  # Plugins that are there need not agree: pytest-benchmark stops a run of pytest-xdist.
  pytest=("$python" -m pytest -q -p no:cacheprovider -p no:benchmark -m gpu "${files[@]}")
  if [ -n "$no_gpu" ]; then stage selection 30 "${pytest[@]}" --collect-only; fi
  if "$python" -c "import xdist" 2>/dev/null; then
    pytest+=(-n 4)
    threads=$((($(nproc) + 3) / 4)) # each, or they wait for one another: the references are computed on the CPU
  fi
  gpu_stage tests-gpu 300 "$python" env OMP_NUM_THREADS="${threads:-$(nproc)}" "${pytest[@]}"
fi

gpu_stage bench 160 "$python" "$python" -m ewc_fast bench --device cuda \
  --workloads gpt2_small,llama_1b --steps --rounds 15 --out "$out" \
  --peers eager,loop,foreach,compile_loop,level1,level2,level2_attach,level2_bf16_fisher,value
gpu_stage bench-optimizers 60 "$python" "$python" -m ewc_fast bench --optimizers --device cuda \
  --workload llama_1b --no-steps --out "$out"

for tool in memcheck racecheck initcheck; do # without the caching allocator, so that a tensor's end is an allocation's
  gpu_stage "sanitizer-$tool" 30 compute-sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu/penalty_passes.py --small
done

counters=gpu__time_duration.sum,dram__bytes.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed
if ! gpu_stage ncu 40 ncu ncu --csv --kernel-name regex:penalty_kernel --launch-skip 3 --launch-count 5 \
  --metrics "$counters" "$python" benchmarks/gpu/penalty_passes.py; then
  if grep -q ERR_NVGPUCTRPERM "$out/ncu.log" 2>/dev/null; then # a matter of the machine's settings, not of the code
    last=$((${#names[@]} - 1))
    outcomes[last]=skipped
    reasons[last]="no permission to read the GPU's counters (ERR_NVGPUCTRPERM)"
    printf '%-22s %s\n' "" "skipped: ${reasons[last]}"
  fi
fi

# ---- results ----

quote() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')"; }
nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
{
  printf '{\n  "machine": {\n'
  printf '    "date": %s,\n' "$(quote "$(date -u +%Y-%m-%dT%H:%M:%SZ)")"
  printf '    "card": %s,\n' "$(quote "$card")"
  printf '    "compute_capability": %s,\n' "$(quote "$(ask_card compute_cap)")"
  printf '    "memory": %s,\n' "$(quote "$(ask_card memory.total)")"
  printf '    "driver": %s,\n' "$(quote "$(ask_card driver_version)")"
  printf '    "nvcc": %s,\n' "$(quote "$nvcc")"
  printf '    "torch": %s,\n' "$(quote "$torch")"
  printf '    "cores": %s\n  },\n  "stages": [\n' "$(nproc)"
  for i in "${!names[@]}"; do
    printf '    {"name": %s, "outcome": %s, "seconds": %s, "detail": %s}' "$(quote "${names[i]}")" \
      "$(quote "${outcomes[i]}")" "${seconds[i]}" "$(quote "${reasons[i]}")"
    ((i == ${#names[@]} - 1)) || printf ','
    printf '\n'
  done
  printf '  ]\n}\n'
} >"$out/summary.json"
status=0
{
  printf 'card: %s; driver: %s; torch: %s; nvcc: %s\n\n' "${card:-none}" "$(ask_card driver_version)" "$torch" "$nvcc"
  for i in "${!names[@]}"; do
    printf '%-22s %-9s %4s s  %s\n' "${names[i]}" "${outcomes[i]}" "${seconds[i]}" "${reasons[i]}"
  done
} >"$out/summary.txt"
for outcome in "${outcomes[@]}"; do
  case $outcome in failed | "timed out") status=1 ;; esac
done
echo "$SECONDS s; summary.txt, summary.json and logs are in $out"
exit "$status"
