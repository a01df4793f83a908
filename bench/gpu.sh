#!/usr/bin/env bash
# All that a GPU must show, in one call without network: install, benchmarks, tests,
# compute-sanitizer, verify. It ends within $LIMIT seconds (default: 560); no GPU has timed it yet.
# gpu.json and logs.tgz go to $OUT (default: bench/results/gpu), and grow as it goes on. Needs torch
# with CUDA, nvcc, triton, pytest, pytest-benchmark, hypothesis and mpmath; goes on after a failure,
# and says at the end what failed. CUDA_ARCHITECTURES is the GPU's own: 90a-real is Hopper.
# COMMIT names what is timed where there is no git.
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
LIMIT=${LIMIT:-560}
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2  # some thirty processes run side by side
mkdir -p "$OUT"
LOGS=$(mktemp -d)
export LOGS
trap 'rm -rf "$LOGS"' EXIT
failed=()
set -m  # so that what runs beside it hears SIGINT, of which pytest tells what has failed so far
declare -A began limits parts

begin() {  # name, seconds at most, command...: side by side with what has begun
  local name=$1
  limits[$name]=$2 began[$name]=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=10 "${limits[$name]}" "$@" >"$LOGS/$name.log" 2>&1 &
  parts[$name]=$!
}

end() {  # names
  local name status
  for name in "$@"; do
    wait "${parts[$name]}"
    status=$?
    if ((status)); then
      echo "$name: FAILED ($status) at $SECONDS s, ${limits[$name]} s at most"
      grep -E "^(FAILED|ERROR)" "$LOGS/$name.log" || tail -n 15 "$LOGS/$name.log"
      failed+=("$name")
    else
      echo "$name: passed within $((SECONDS - began[$name])) s: $(tail -n 1 "$LOGS/$name.log")"
    fi
  done
  tar -czf "$OUT/logs.tgz" -C "$LOGS" .
}

bench() {  # backend, seconds at most
  begin "bench-$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider -W default bench/test_gpu.py \
    -k "$1" --benchmark-enable --json-out "$OUT/gpu.json"
  end "bench-$1"
  sed -n '/^copy /,/^geometric/p' "$LOGS/bench-$1.log"
}

export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-16}
begin install 120 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e . \
  --config-settings=cmake.define.TL1_CUDA=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90a-real}"
end install
begin info 60 "$PYTHON" -m tl1kernels info
end info
bench cuda 100  # at once: it has nothing to compile

# What is not timed runs side by side: Triton compiles for minutes, `verify` alone some 700 kernels.
triton_bench=90  # seconds, when all that it takes is compiled
limit=$((LIMIT - SECONDS - triton_bench - 25))
test_files=(tests/test_gpu.py tests/test_gpu_backends.py tests/test_triton.py)
# The stack of a test that hangs is printed; pytest itself would end without a word.
pytest=("$PYTHON" -m pytest -q --tb=short -rf -p no:cacheprovider -o faulthandler_timeout=100)
many=()
"$PYTHON" -c 'import xdist' >/dev/null 2>&1 && many=(-n 8)
begin tests-cuda $limit "${pytest[@]}" "${many[@]}" "${test_files[@]}" -k cuda
begin tests-triton $limit "${pytest[@]}" "${many[@]}" "${test_files[@]}" -k "not cuda"
# Each case once: what Triton compiles for it is there when it is timed.
begin bench-once $limit "${pytest[@]}" "${many[@]/8/4}" -W default bench/test_gpu.py -k triton
side_by_side=(tests-cuda tests-triton bench-once verify-cuda)
verify() {  # backend, name, options
  "$PYTHON" -m tl1kernels verify --backend "$1" "${@:3}" --json >"$LOGS/verify-$1$2.json"
}
export -f verify
begin verify-cuda $limit bash -c 'verify cuda ""'
names="from tl1kernels.backends import triton_launch as t; print(*t.penalties())"
for penalty in none $("$PYTHON" -c "$names"); do  # none: groups alone
  begin "verify-triton-$penalty" $limit bash -c "verify triton -$penalty --penalty $penalty"
  side_by_side+=("verify-triton-$penalty")
done
sanitize() {  # tool, backend
  # Not every case: a kernel is tens of times slower there. Without torch's cache each tensor has
  # its own bounds.
  local some="(dtype1 and rows and 147) or (dtype0 and (aligned or (input and 3x3) or (whole and layer)))"
  begin "$1-$2" $limit env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
    --error-exitcode 9 --report-api-errors no --target-processes all \
    "${pytest[@]}" tests/test_gpu_backends.py -k "every_tile_agrees and $2 and ($some)"
  side_by_side+=("$1-$2")
}
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do sanitize $tool cuda; done
  for tool in memcheck racecheck; do sanitize $tool triton; done
else
  echo "compute-sanitizer: not found, not run"
fi
end "${side_by_side[@]}"
grep -l "Device not supported" "$LOGS"/*check-*.log 2>/dev/null && echo "refused by this device, not run"

bench triton $((LIMIT - SECONDS - 15))
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed in $SECONDS s; results in $OUT"
