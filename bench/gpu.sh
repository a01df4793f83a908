#!/usr/bin/env bash
# All that a GPU must show, in one call of under 9 minutes, without network: install, tests,
# compute-sanitizer, verify, benchmarks. Logs and JSON go to $OUT (default: bench/results/gpu).
# Needs torch with CUDA, triton, pytest, pytest-benchmark, hypothesis and mpmath; goes on after a
# failure, and says at the end what failed.
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

part install 60 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
part info 30 "$PYTHON" -m tl1kernels info
part tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_triton.py
part verify 45 bash -c '"$PYTHON" -m tl1kernels verify --backend triton --json >"$0/verify.json" &&
  echo "verify passed"' "$OUT"
if command -v compute-sanitizer >/dev/null; then
  # Not every case: a kernel is tens of times slower there.
  some="rows of 147 or aligned columns or input channels 3x3 or whole layer or full tile"
  for tool in memcheck racecheck; do
    part "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton.py \
      -k "every_tile_agrees and dtype0 and ($some)"
  done
else
  echo "compute-sanitizer: not found, not run"
fi
part bench 120 "$PYTHON" -m pytest -q -p no:cacheprovider bench/test_gpu.py --benchmark-enable \
  --benchmark-disable-gc --json-out "$OUT/gpu.json"
sed -n '/^copy /,/^geometric/p' "$OUT/bench.log"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed; results in $OUT"
