#!/usr/bin/env bash
# All that a GPU must show, in one call of under 10 minutes, without network: install, tests,
# compute-sanitizer, verify, benchmarks. Logs and JSON go to $OUT (default: bench/results/gpu).
# Needs torch with CUDA, nvcc, triton, pytest, pytest-benchmark, hypothesis and mpmath; goes on after
# a failure, and says at the end what failed. CUDA_ARCHITECTURES is the GPU's own: 90a-real is Hopper.
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=()

part() {  # name, seconds at most, command...
  local name=$1 limit=$2
  shift 2
  local start=$SECONDS
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    echo "$name: passed in $((SECONDS - start)) s: $(tail -n 1 "$OUT/$name.log")"
  else
    echo "$name: FAILED ($?) after $((SECONDS - start)) s"
    tail -n 15 "$OUT/$name.log"
    failed+=("$name")
  fi
}

export PYTHON

many=()
"$PYTHON" -c 'import xdist' 2>/dev/null && many=(-n 8)
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-16}
part install 120 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e . \
  --config-settings=cmake.define.TL1_CUDA=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90a-real}"
part info 30 "$PYTHON" -m tl1kernels info
# Both compile some hundreds of kernels: side by side, the compiler has the cores to itself.
"$PYTHON" -m tl1kernels verify --backend triton --json >"$OUT/verify.json" 2>"$OUT/verify.log" &
verify=$!
part verify-cuda 60 sh -c '"$PYTHON" -m tl1kernels verify --backend cuda --json >"$0"' \
  "$OUT/verify-cuda.json"
part tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider "${many[@]}" \
  tests/test_gpu.py tests/test_gpu_backends.py tests/test_triton.py
part verify 120 tail --pid="$verify" -f /dev/null
wait "$verify" || failed+=("verify: not all checks passed, see verify.json")
if command -v compute-sanitizer >/dev/null; then
  # Not every case: a kernel is tens of times slower there. Without torch's cache each tensor has
  # its own bounds.
  some="(dtype1 and rows and 147) or (dtype0 and (aligned or (input and 3x3) or (whole and layer)))"
  for tool in memcheck racecheck initcheck; do
    part "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --report-api-errors no --target-processes all \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu_backends.py \
      -k "every_tile_agrees and ($some)"
    grep -q "Device not supported" "$OUT/$tool.log" && echo "$tool: this device refuses it, not run"
  done
else
  echo "compute-sanitizer: not found, not run"
fi
part bench 150 "$PYTHON" -m pytest -q -p no:cacheprovider -W default bench/test_gpu.py \
  --benchmark-enable --json-out "$OUT/gpu.json"
sed -n '/^copy /,/^geometric/p' "$OUT/bench.log"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed; results in $OUT"
