#!/usr/bin/env bash
# All that a GPU must show, in one call without network: install, tests, compute-sanitizer, verify,
# benchmarks. It should take less than 9 minutes; no GPU has timed it yet. Logs and JSON go to $OUT
# (default: bench/results/gpu). Needs torch with CUDA, nvcc, triton, pytest, pytest-benchmark,
# hypothesis and mpmath; goes on after a failure, and says at the end what failed. CUDA_ARCHITECTURES
# is the GPU's own: 90a-real is Hopper.
# COMMIT names what is timed where there is no git.
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=()
set -m  # so that what runs beside it hears SIGINT, of which pytest tells what has failed so far
declare -A began limits parts

begin() {  # name, seconds at most, command...: side by side with what has begun
  local name=$1
  limits[$name]=$2 began[$name]=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=10 "${limits[$name]}" "$@" >"$OUT/$name.log" 2>&1 &
  parts[$name]=$!
}

end() {  # names
  local name status
  for name in "$@"; do
    wait "${parts[$name]}"
    status=$?
    if ((status)); then
      echo "$name: FAILED ($status) at $SECONDS s, ${limits[$name]} s at most"
      grep -E "^(FAILED|ERROR)" "$OUT/$name.log" || tail -n 15 "$OUT/$name.log"
      failed+=("$name")
    else
      echo "$name: passed within $((SECONDS - began[$name])) s: $(tail -n 1 "$OUT/$name.log")"
    fi
  done
}

export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-16}
begin install 120 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e . \
  --config-settings=cmake.define.TL1_CUDA=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90a-real}"
end install
begin info 30 "$PYTHON" -m tl1kernels info
end info

# What is not timed runs side by side: Triton compiles for minutes, `verify` alone some 700 kernels.
limit=320
test_files=(tests/test_gpu.py tests/test_gpu_backends.py tests/test_triton.py)
pytest=("$PYTHON" -m pytest -q --tb=short -rf -p no:cacheprovider)
many=()
"$PYTHON" -c 'import xdist' >/dev/null 2>&1 && many=(-n 8)
begin tests-triton $limit "${pytest[@]}" "${many[@]}" "${test_files[@]}" -k "not cuda"
begin tests-cuda $limit "${pytest[@]}" "${many[@]/8/4}" "${test_files[@]}" -k cuda
# Each case once: what Triton compiles for it is there when it is timed.
begin bench-once $limit "${pytest[@]}" "${many[@]/8/4}" -W default bench/test_gpu.py -k triton
side_by_side=(tests-cuda tests-triton bench-once verify-cuda)
verify() {  # backend, name, options
  "$PYTHON" -m tl1kernels verify --backend "$1" "${@:3}" --json >"$OUT/verify-$1$2.json"
}
export -f verify
export OUT
begin verify-cuda $limit bash -c 'verify cuda ""'
names="from tl1kernels.backends import triton_launch as t; print(*t.penalties())"
for penalty in none $("$PYTHON" -c "$names"); do  # none: groups alone
  begin "verify-triton-$penalty" $limit bash -c "verify triton -$penalty --penalty $penalty"
  side_by_side+=("verify-triton-$penalty")
done
if command -v compute-sanitizer >/dev/null; then
  # Not every case: a kernel is tens of times slower there. Without torch's cache each tensor has
  # its own bounds.
  some="(dtype1 and rows and 147) or (dtype0 and (aligned or (input and 3x3) or (whole and layer)))"
  for tool in memcheck racecheck initcheck; do
    begin "$tool" $limit env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --report-api-errors no --target-processes all \
      "${pytest[@]}" tests/test_gpu_backends.py -k "every_tile_agrees and ($some)"
    side_by_side+=("$tool")
  done
else
  echo "compute-sanitizer: not found, not run"
fi
end "${side_by_side[@]}"
grep -l "Device not supported" "$OUT"/*check.log 2>/dev/null && echo "refused by this device, not run"

begin bench 150 "$PYTHON" -m pytest -q -p no:cacheprovider -W default bench/test_gpu.py \
  --benchmark-enable --json-out "$OUT/gpu.json"
end bench
sed -n '/^copy /,/^geometric/p' "$OUT/bench.log"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed in $SECONDS s; results in $OUT"
