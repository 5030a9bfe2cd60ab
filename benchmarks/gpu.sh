#!/usr/bin/env bash
# Everything that a machine with a GPU should run, in less than nine minutes: tests that need one, a training run, speed,
# the rotation alone, memory.
#
#     OUT=/path/to/results benchmarks/gpu.sh
#
# OUT       folder for the results; made if it is not there
# PYTHON    interpreter in which timm_rope can be imported (default: python); nothing is installed
# QUICK=1   tiny sizes on the CPU, a rehearsal
# Every part has a time limit of its own, so that a slow one cannot eat the rest; what it measured until then is in its
# JSON file, marked as unfinished. OUT/log.txt has the output of all parts. The exit status is 1 if a part failed.
set -uo pipefail

if [ -z "${OUT:-}" ]; then
    echo 'gpu.sh: set OUT to the folder for the results.' >&2
    exit 2
fi
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
log=$OUT/log.txt
: > "$log" || exit 2

missing=$("$python" -c '
import importlib.util
print(*(n for n in ("torch", "timm", "timm_rope", "pytest") if importlib.util.find_spec(n) is None))') || exit 2
if [ -n "$missing" ]; then
    echo "gpu.sh: $python lacks $missing: pip install -e '.[dev]', or name another interpreter with PYTHON." >&2
    exit 2
fi

quick=${QUICK:-0}
if [ "$quick" != 1 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo 'gpu.sh: torch finds no CUDA device here. QUICK=1 rehearses on the CPU.' >&2
    exit 2
fi

status=0
part() {  # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 begin=$SECONDS code
    shift 2
    echo "== $name (at most $seconds s): $*" | tee -a "$log"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) result='done' ;;
        124 | 137) result='stopped at its time limit' status=1 ;;
        *) result="failed with status $code" status=1 ;;
    esac
    echo "== $name: $result after $((SECONDS - begin)) s" | tee -a "$log"
}

machine() {
    command -v nvidia-smi > /dev/null && nvidia-smi
    "$python" -m timm_rope doctor  # its verdict is on the installation, which need not be complete here
    true
}

gpu_tests() {
    "$python" -m pytest -m gpu -p no:cacheprovider --junitxml "$OUT/tests.xml" tests
    local code=$?
    [ "$code" = 5 ] || return "$code"  # 5: there are none
}

export -f machine gpu_tests
export python OUT
speed=("$python" benchmarks/speed.py)
learned='vit_small_rope_mixed vit_small_rope_spherical_learned'
fixed='vit_small_rope_axial vit_small_rope_uniform vit_small_rope_spherical'
ports='vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_224'
unit=deit3_small_patch16_224

# shellcheck disable=SC2086  # lists of models are split on purpose
if [ "$quick" = 1 ]; then
    tiny=embed_dim=24,depth=2,num_heads=2,num_classes=5
    common=(--device cpu --rounds 1)
    part machine 60 bash -c machine
    part tests 300 bash -c gpu_tests
    part train 120 "$python" benchmarks/train_loop.py --device cpu --steps 200 --batch 32 \
        vit_tiny_rope_mixed,embed_dim=48,num_heads=2,depth=2 --json "$OUT/train.json"
    part speed 120 "${speed[@]}" "${common[@]}" --model-args $tiny --batch 2 --size 32 --precision bf16-autocast bf16 \
        --json "$OUT/speed.json"
    part rotation 120 "$python" benchmarks/rotation.py "${common[@]}" --heads 1 --shapes 2x5 \
        --json "$OUT/rotation.json"
    part memory 120 "$python" benchmarks/memory.py "${common[@]}" $unit vit_small_rope_mixed --model-args $tiny \
        --batch 2 --size 32 --precision bf16-autocast --json "$OUT/memory.json"
    part compile 300 "${speed[@]}" "${common[@]}" $unit vit_small_rope_axial --model-args $tiny --batch 2 --size 32 \
        --mode eval --precision bf16-autocast --run compile --json "$OUT/speed_compile.json"
    part large 120 "${speed[@]}" "${common[@]}" $unit vit_small_rope_axial --model-args $tiny --batch 1 --size 64 \
        --precision bf16-autocast --json "$OUT/speed_large.json"
else
    part machine 25 bash -c machine
    part tests 90 bash -c gpu_tests
    part train 45 "$python" benchmarks/train_loop.py --json "$OUT/train.json"
    part speed 110 "${speed[@]}" --rounds 7 --steps 5 --batch 256 --precision bf16-autocast bf16 \
        --json "$OUT/speed.json"
    part rotation 45 "$python" benchmarks/rotation.py --json "$OUT/rotation.json"
    part memory 45 "$python" benchmarks/memory.py --precision bf16-autocast --rounds 1 --json "$OUT/memory.json"
    part compile 130 "${speed[@]}" --rounds 7 --steps 5 $unit vit_small_rope_mixed vit_small_rope_spherical \
        --batch 256 --precision bf16-autocast --run compile --json "$OUT/speed_compile.json"
    part large 40 "${speed[@]}" --rounds 7 --steps 5 $unit $fixed $learned $ports --batch 8 --size 1024 \
        --precision bf16-autocast --json "$OUT/speed_large.json"
fi
echo "== all parts ended after $SECONDS s, status $status" | tee -a "$log"
exit $status
