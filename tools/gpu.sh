#!/usr/bin/env bash
# Runs the GPU side of the project on a machine that has a GPU, and a python3 with torch, pytest,
# scikit-build-core, cuda-core and cuda-bindings. It needs no network: wheels that python3 lacks
# (apache-tvm-ffi) are taken from the folder .whl, if there is one.
#
#   tools/gpu.sh [build] [test] [bench] [bars] [training] [host] [peers] [grid] [ncu]
#                [sanitize]
#                                                       no argument: build test bench
#
# Environment: OUT (default build/out) receives the full logs; QKROPE_COMMIT names the commit in
# bench records where there is no git checkout; PYTEST_ARGS, BENCH_ARGS, BARS_ARGS, PEERS_ARGS,
# GRID_ARGS, TRAINING_ARGS, SANITIZE_ARGS are passed on; PEERS (default peers) is the folder that
# tools/fetch_peers.py filled.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-build/out}
python=${GPU_PYTHON:-python3}
mkdir -p "$out"
rm -f "$out"/{build,test,bench,bars,training,host,peers,grid,ncu,sanitize}.log
export QKROPE_COMMIT=${QKROPE_COMMIT:-$(git rev-parse --short=12 -q --verify HEAD 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1
summary=()
failed=0

note() { summary+=("$(printf '%-24s %-6s %5d s  %s' "$1" "$2" "$3" "$4")"); }

# run NAME LOG COMMAND...: output to LOG and here, the verdict and the last line in the summary.
run() {
  local name=$1 log=$out/$2 start=$SECONDS verdict=ok code
  shift 2
  echo "--- $name: $*" | tee -a "$log"
  "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  if ((code)); then verdict="rc=$code" failed=1; fi
  note "$name" "$verdict" $((SECONDS - start)) "$(grep -v "^---" "$log" | tail -n 1 | cut -c 1-100)"
  return "$code"
}

build() {
  if compgen -G '.whl/*.whl' >/dev/null; then
    run wheels build.log "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade \
      --target build/site .whl/*.whl || return
  fi
  run build build.log "$python" -m pip install -q --no-index --no-build-isolation --no-deps \
    --upgrade --target build/gpu -C build-dir=build/gpu-cmake . || return
  run info build.log "$python" -m qkrope info
}

# Every test by name in the log, so that a run that is cut short still says what failed.
tests() {
  local start=$SECONDS verdict=ok
  "$python" -m pytest -p no:cacheprovider -m gpu -v ${PYTEST_ARGS:-} >"$out/test.log" 2>&1 ||
    verdict="rc=$?" failed=1
  grep -E '(FAILED|ERROR) |^E  ' "$out/test.log" | cut -c 1-200 | head -40
  note test "$verdict" $((SECONDS - start)) "$(tail -n 1 "$out/test.log")"
}

bench() {
  run bench bench.log "$python" -m qkrope bench --out "$out/gpu.jsonl" --plot "$out/gpu.png" \
    ${BENCH_ARGS:-}
}

bars() {
  run bars bars.log "$python" -m qkrope.bench.bars --out "$out/bars.jsonl" ${BARS_ARGS:-}
}

# First each peer once on a tiny case; then the times, without torch.compile (seconds a case)
# unless PEERS_ARGS says otherwise.
peers() {
  local folder=${PEERS:-peers}
  run peers-dry peers.log "$python" -m qkrope bench --peers "$folder" --dry-run --baselines eager \
    --shape Qwen3-8B --shape FLUX.1
  run peers peers.log "$python" -m qkrope bench --peers "$folder" --out "$out/peers.jsonl" \
    ${PEERS_ARGS:---baselines eager --shape Qwen3-8B --shape FLUX.1 --tokens 1,64,256,1024,4096,16384}
}

# Forward and backward beside torch.compile and Liger.
training() {
  run training training.log "$python" -m qkrope.bench.training --peers "${PEERS:-peers}" \
    --out "$out/training.jsonl" ${TRAINING_ARGS:-}
}

host() {
  run host host.log "$python" -m qkrope.bench.host --out "$out/host.jsonl"
}

# The scan behind the rules of rows and warps.
grid() {
  run grid grid.log "$python" -m qkrope.bench.bars --grid --out "$out/grid.jsonl" ${GRID_ARGS:-}
}

# DRAM throughput and occupancy of one call of 16384 tokens, and of torch's negation of 1 GiB.
ncu() {
  run ncu ncu.log command ncu --clock-control none --metrics \
    dram__bytes.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread \
    --kernel-name 'regex:qkrope_|vectorized_elementwise' --print-summary per-kernel \
    "$python" tools/ncu_case.py
}

# Only our kernels are instrumented. Torch's caching allocator is off, so that each tensor is an
# allocation of its own and a read past its end is seen. Memory that torch's own kernels wrote
# counts as uninitialised under initcheck: -m sanitize tests copy their inputs from the host.
sanitize() {
  local filter=(--kernel-name kns=qkrope_ --error-exitcode 9 --print-limit 20
    --report-api-errors no --launch-timeout 60)
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 TORCHINDUCTOR_COMPILE_THREADS=1
  local tool extra jobs=() start=$SECONDS
  for tool in memcheck initcheck synccheck; do  # side by side: they wait for the host, not the GPU
    extra=()
    [[ $tool == initcheck ]] && extra=(--check-api-memory-access no)
    compute-sanitizer --tool "$tool" "${filter[@]}" "${extra[@]}" "$python" -m pytest \
      -p no:cacheprovider -p no:xdist -m "sanitize and gpu" ${SANITIZE_ARGS:-} \
      >"$out/$tool.log" 2>&1 &
    jobs+=("$tool:$!")
  done
  for job in "${jobs[@]}"; do
    tool=${job%%:*}
    if wait "${job##*:}"; then verdict=ok; else verdict="rc=$?" failed=1; fi
    note "$tool" "$verdict" $((SECONDS - start)) \
      "$(grep -E 'passed|failed' "$out/$tool.log" | tail -n 1); $(tail -n 1 "$out/$tool.log")"
    cat "$out/$tool.log" >>"$out/sanitize.log"
    rm "$out/$tool.log"
  done
  # A clean report proves nothing if the filter matches nothing: this one must not be clean.
  start=$SECONDS
  compute-sanitizer --tool initcheck --check-api-memory-access no "${filter[@]}" \
    "$python" tools/planted_fault.py uninitialised >>"$out/sanitize.log" 2>&1
  if (($? == 9)); then
    note control ok $((SECONDS - start)) "the planted uninitialised read was reported"
  else
    note control FAILED $((SECONDS - start)) "the planted uninitialised read was not reported"
    failed=1
  fi
}

export PYTHONPATH="$PWD/build/gpu:$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}"
(($#)) || set -- build test bench
for step in "$@"; do
  case $step in
    build) build ;;
    test) tests ;;
    bench) bench ;;
    bars) bars ;;
    training) training ;;
    host) host ;;
    peers) peers ;;
    grid) grid ;;
    ncu) ncu ;;
    sanitize) sanitize ;;
    *)
      echo "unknown step '$step'; got '$*', expected steps of the list at the top" >&2
      exit 2
      ;;
  esac
  if [[ $step == build ]] && ((failed)); then break; fi
done

echo
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
echo "commit $QKROPE_COMMIT"
printf '%s\n' "${summary[@]}"
exit "$failed"
