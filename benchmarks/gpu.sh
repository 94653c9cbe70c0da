#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in parts that each end within nine minutes; no network is used.
#
#   benchmarks/gpu.sh                      all parts
#   benchmarks/gpu.sh build                compile with CUDA and install, editable, into the current Python
#   benchmarks/gpu.sh tests [PYTEST ARGS]  all tests, or those named; a GPU test that could not run is a failure
#   benchmarks/gpu.sh sanitizer [TOOL...]  op tests under compute-sanitizer: memcheck racecheck initcheck synccheck
#   benchmarks/gpu.sh bench                all benchmark cases, without torch.compile, which takes minutes per flow
#   benchmarks/gpu.sh bench GLOB           the cases whose name matches, with torch.compile
#
# Needs PyTorch with CUDA and triton, nvcc and compute-sanitizer of the same CUDA major version, cmake, ninja, pybind11,
# pytest, numpy.  PYTHON chooses the interpreter.  Results go to benchmarks/results/<gpu>-<date>.json and .png, and with
# OUT set everything that was written is copied there too.  Exit status: 0 only if all that was asked for ran and passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LIMIT=525 # seconds of a part
readonly PYTHON=${PYTHON:-python3}
readonly RESULTS=benchmarks/results
readonly LOGS=build/gpu
readonly TOOLS=(memcheck racecheck initcheck synccheck)
part_start=0
written=()

die() {
    echo "gpu.sh: $*" >&2
    exit 1
}

publish() {
    [[ -n ${OUT:-} ]] || return 0
    mkdir -p "$OUT"
    local file
    for file in "${written[@]}"; do
        [[ ! -e $file ]] || cp "$file" "$OUT/"
    done
}
trap publish EXIT

# Run a command for at most the seconds that the part has left.
limited() {
    local left=$((LIMIT - (SECONDS - part_start))) status=0
    ((left > 5)) || die "no time left for: $*"
    timeout --signal=INT --kill-after=10 "$left" "$@" || status=$?
    ((status != 124 && status != 137)) || echo "gpu.sh: stopped after $left s: $*" >&2
    return "$status"
}

need_gpu() {
    "$PYTHON" - <<'EOF' || die "this machine cannot run the GPU parts"
import sys

import torch

print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability())
EOF
}

need_build() {
    "$PYTHON" - <<'EOF' || die "run benchmarks/gpu.sh build first"
import sys

from fastflow import backend

if backend.extension is None:
    sys.exit(backend.extension_error)
print(backend.extension.build_info())
if not backend.extension.build_info()["cuda"]:
    sys.exit("fastflow was built without CUDA")
if not backend.has_triton:
    sys.exit("triton is not installed")
EOF
}

build() {
    FASTFLOW_FORCE_CUDA=1 limited "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . || return
    need_build
}

tests() {
    need_build
    local report=$LOGS/tests.xml status=0
    written+=("$report")
    limited "$PYTHON" -m pytest -rs --durations=15 --junitxml="$report" "$@" || status=$?
    "$PYTHON" - "$report" <<'EOF' || status=1
import sys
import xml.etree.ElementTree as ElementTree

reasons = [node.get("message", "") for node in ElementTree.parse(sys.argv[1]).iter("skipped")]
absent = [reason for reason in reasons if "no GPU" in reason or "without CUDA" in reason]
print(f"{len(reasons)} tests skipped, {len(absent)} of them for want of a GPU")
sys.exit(bool(absent))
EOF
    return "$status"
}

sanitizer() {
    need_build
    local sanitizer tool op status=0
    sanitizer=$(command -v compute-sanitizer || true)
    [[ -n $sanitizer ]] || sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
    [[ -x $sanitizer ]] || die "compute-sanitizer was not found in PATH, CUDA_HOME or /usr/local/cuda"
    local files=() ours=(--kernel-name kns=fastflow)
    for op in kernels/*.py; do
        op=$(basename "$op" .py)
        [[ -e tests/test_$op.py ]] || continue
        files+=("tests/test_$op.py")
        ours+=(--kernel-name "kns=$op")
    done
    # Tests that compile or repeat take hours under a sanitizer and reach no other memory.
    local chosen="(cuda or triton) and not (compile or export or opcheck or random or fifty or full_size)"
    for tool in "$@"; do
        local filter=() log=$LOGS/$tool.log
        [[ " ${TOOLS[*]} " == *" $tool "* ]] || die "sanitizer tools are ${TOOLS[*]}; got $tool"
        # PyTorch's own kernels read memory that nobody wrote, and then ignore it.
        [[ $tool != initcheck ]] || filter=("${ours[@]}")
        written+=("$log")
        echo "== $tool"
        # Without the caching allocator every tensor is an allocation of its own, so an overrun leaves it.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$sanitizer" --tool "$tool" --error-exitcode 99 \
            --target-processes application-only --report-api-errors no "${filter[@]}" \
            "$PYTHON" -m pytest -p no:cacheprovider -x -k "$chosen" "${files[@]}" >"$log" 2>&1 || status=$?
        tail -n 5 "$log"
        grep -Eq '[0-9]+ passed' "$log" || { echo "gpu.sh: $tool ran no test to its end, see $log" >&2 && status=1; }
        ((status == 0)) || { grep -m 40 '^=========' "$log" || true; }
    done
    return "$status"
}

bench() {
    need_build
    local glob=${1:-} name status=0 choice=(--providers auto cuda triton cosyvoice)
    name=$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))') || return
    name+=-$(date +%Y-%m-%d)
    if [[ -n $glob ]]; then
        choice=(--only "$glob")
        name+=-$(tr -cs 'a-zA-Z0-9\n' '-' <<<"$glob" | sed 's/^-*//; s/-*$//')
    fi
    local json=$RESULTS/$name.json
    written+=("$json" "$RESULTS/$name.png")
    # What torch.compile has compiled is kept for the next call.
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
    limited "$PYTHON" benchmarks/run.py --device cuda --minutes 6 --no-plot --out "$json" "${choice[@]}" || status=$?
    [[ ! -e $json ]] || "$PYTHON" benchmarks/plot.py "$json" || echo "gpu.sh: no picture; draw it elsewhere from $json" >&2
    return "$status"
}

run_part() {
    local part=$1
    shift
    case $part in
    build) set -- ;;
    tests) (($#)) || set -- tests ;;
    sanitizer) (($#)) || set -- "${TOOLS[@]}" ;;
    bench) ;;
    *)
        echo "gpu.sh: unknown part '$part'; the parts are build | tests | sanitizer | bench" >&2
        exit 2
        ;;
    esac
    part_start=$SECONDS
    echo "=== $part"
    local status=0
    "$part" "$@" || status=$?
    echo "=== $part: exit status $status after $((SECONDS - part_start)) s"
    return "$status"
}

mkdir -p "$LOGS" "$RESULTS"
if (($#)); then
    case $1 in build | tests | sanitizer | bench) need_gpu ;; esac
    run_part "$@"
else
    need_gpu
    run_part build
    failed=()
    for part in tests sanitizer bench; do
        run_part "$part" || failed+=("$part")
    done
    ((${#failed[@]} == 0)) || die "failed: ${failed[*]}"
fi
