#!/usr/bin/env bash
# Everything that a machine with a GPU should run, most valuable first, in eight minutes: tests of kernels and models by
# value, doctor, whole models against timm's, the rotation alone, memory, training, timm's own scripts, large images.
#
#     OUT=/path/to/results benchmarks/gpu.sh
#     benchmarks/gpu.sh fetch                   beforehand, where there is a network: fills .gpu/
#
# OUT           folder for the results, eight files; made if it is not there
# PYTHON        interpreter with torch, torchvision, triton, timm and pytest (default: python3); nothing is installed,
#               timm_rope is taken from this folder
# TIMM_GIT      for fetch: another clone of timm's repository (default: GitHub's)
# TIMM_SCRIPTS  folder with timm's train.py and validate.py (default: .gpu/timm)
# MINUTES       for all parts together (default: 8)
# QUICK=1       tiny models and few rounds on the CPU, a rehearsal
#
# `fetch` puts into .gpu/ what may be missing on a machine without a network: a wheel of timm, used only where timm is
# not installed or too old, and timm's scripts. Git ignores .gpu/; where the working tree is copied, name it.
# What only asks whether something works runs side by side, and with it the compilation of what is timed afterwards, for
# torch's cache; what is timed runs alone. Every part has a time limit of its own and none gets more than what is left, so
# that a slow one cannot eat the rest; its JSON file has what it measured until then, marked as unfinished. OUT/log.txt has the output of all parts, and
# machine.txt, written first, says what they ran on. The exit status is 1 if a part failed.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
timm_version=1.0.31

if [ "${1:-}" = fetch ]; then
    set -e
    mkdir -p .gpu/wheels
    "$python" -m pip download -q --no-deps --only-binary=:all: -d .gpu/wheels timm==$timm_version
    rm -rf .gpu/timm
    source=${TIMM_GIT:-https://github.com/huggingface/pytorch-image-models}
    git clone -q --depth 1 --branch v$timm_version "$source" .gpu/timm || git clone -q --depth 1 "$source" .gpu/timm
    rm -rf .gpu/timm/.git .gpu/timm/timm  # the scripts only: a folder timm/ beside them would hide the installed one
    echo "gpu.sh: .gpu/ is ready, $(du -sh .gpu | cut -f1)"
    exit
fi

if [ -z "${OUT:-}" ]; then
    echo 'gpu.sh: set OUT to the folder for the results.' >&2
    exit 2
fi
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
log=$OUT/log.txt
: > "$log" || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TIMM_ROPE_AUTOLOAD=1
if [ -d .gpu/wheels ] && ! "$python" -c 'from timm_rope import plugin; import timm
raise SystemExit(plugin.release(timm.__version__) < plugin.MIN_TIMM)' 2> /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --target "$scratch/site" .gpu/wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:$scratch/site
fi
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
deadline=$((SECONDS + 60 * ${MINUTES:-8}))
part() {  # NAME SECONDS COMMAND..., alone
    local name=$1 seconds=$2 begin=$SECONDS code left=$((deadline - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "== $name: no time left" | tee -a "$log"
        status=1
        return
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
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

names=() jobs=()
beside() {  # NAME SECONDS COMMAND..., beside others that are begun likewise
    (log=/dev/null; part "$@"; exit $status) > "$scratch/$1.out" 2>&1 &
    names+=("$1") jobs+=($!)
}
finish() {  # wait for all that were begun, and show what they said
    local i
    for i in "${!names[@]}"; do
        wait "${jobs[$i]}" || status=1
        tee -a "$log" < "$scratch/${names[$i]}.out"
    done
    names=() jobs=()
}

# -- the parts that are more than one command

machine() {  # one line: GPU, driver, versions, commit
    "$python" -c '
import importlib.metadata as m, os, subprocess, sys, timm_rope, torch
def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().replace("\n", "; ")
    except OSError:
        return ""
def version(name):
    try:
        return f"{name} {m.version(name)}"
    except m.PackageNotFoundError:
        return f"no {name}"
gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader") or "no GPU"
commit = os.environ.get("COMMIT") or said("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
print(gpu, f"python {sys.version.split()[0]}", f"CUDA {torch.version.cuda}", *map(version, ("torch", "triton", "timm")),
      f"timm_rope {timm_rope.__version__}", f"commit {commit}", sep=", ")' | tee "$OUT/machine.txt"
}

gpu_tests() {  # compiling the kernels takes most of the time, so several workers do it
    local workers=()
    "$python" -c 'import xdist' 2> /dev/null && workers=(-n "${WORKERS:-8}")
    "$python" -m pytest -m gpu -p no:cacheprovider -q --tb=short --durations=3 ${workers[@]+"${workers[@]}"} \
        tests/kernels tests/rotations tests/models/test_gpu.py
    local code=$?
    [ "$code" = 5 ] || return "$code"  # 5: there are none
}

doctor() {
    "$python" -m timm_rope doctor  # its verdict is on the installation, which need not be complete here
    true
}

stock() {  # timm's own scripts on images of noise: do they run, does validate.py read what train.py wrote
    local scripts=${TIMM_SCRIPTS:-.gpu/timm} data=$scratch/images
    if [ ! -f "$scripts/train.py" ]; then
        echo "no train.py in $scripts: benchmarks/gpu.sh fetch, or set TIMM_SCRIPTS"
        return
    fi
    "$python" -c '
import sys
from pathlib import Path
import numpy as np
from PIL import Image
random = np.random.default_rng(0)
for split, count in (("train", 256), ("val", 64)):
    for label in range(2):
        folder = Path(sys.argv[1], split, str(label))
        folder.mkdir(parents=True)
        for i in range(int(sys.argv[2]) * count // 256):
            pixels = random.integers(0, 128, (64, 64, 3), dtype=np.uint8)
            pixels[:, :32] += np.uint8(96 * label)  # class 1 is brighter on the left
            Image.fromarray(pixels).save(folder / f"{i}.png")' "$data" "${STOCK_IMAGES:-256}" || return
    run() {  # the plugin finds itself only where timm_rope is installed
        "$python" -c 'import runpy, sys; import timm_rope; sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
    }
    # shellcheck disable=SC2086  # STOCK is several options
    run "$scripts/train.py" --data-dir "$data" --num-classes 2 $STOCK --amp --amp-dtype bfloat16 --channels-last \
        --epochs 1 --warmup-epochs 0 --opt adamw --lr 1e-4 --workers 4 --output "$scratch/output" --experiment run \
        --log-interval 4 || return
    # shellcheck disable=SC2086
    run "$scripts/validate.py" --data-dir "$data" --split val --num-classes 2 $STOCK --amp --amp-dtype bfloat16 \
        --channels-last --workers 4 --checkpoint "$scratch/output/run/last.pth.tar"
}

export -f gpu_tests doctor stock
export python OUT scratch
speed=("$python" benchmarks/speed.py)
unit=deit3_small_patch16_224
ours='vit_small_rope_axial vit_small_rope_mixed vit_small_rope_spherical vit_small_rope_spherical_learned
    vit_small_rope_liere'
ports='vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_224'

# shellcheck disable=SC2086  # lists of models are split on purpose
if [ "$quick" = 1 ]; then
    tiny=embed_dim=24,depth=2,num_heads=2,num_classes=5
    common=(--device cpu --rounds 1)
    export WORKERS=2 STOCK_IMAGES=32
    export STOCK="--model vit_tiny_rope_mixed --model-kwargs embed_dim=24 depth=2 num_heads=2 --img-size 32
        --batch-size 16 --device cpu"
    compiled="$unit vit_small_rope_axial"
    compile=("${common[@]}" --model-args $tiny --batch 2 --size 32 --mode eval --precision bf16-autocast --run compile)
    machine 2>&1 | tee -a "$log"
    beside tests 200 bash -c gpu_tests
    beside doctor 120 bash -c doctor
    beside train 200 "$python" benchmarks/train_loop.py --device cpu --steps 200 --batch 32 \
        vit_tiny_rope_mixed,embed_dim=48,num_heads=2,depth=2 --json "$OUT/train.json"
    beside stock 200 bash -c stock
    finish
    part speed 120 "${speed[@]}" "${common[@]}" $unit $ours $ports --model-args $tiny --batch 2 --size 32 \
        --precision bf16-autocast --json "$OUT/speed.json"
    part compile 300 "${speed[@]}" $compiled "${compile[@]}" --json "$OUT/speed_compile.json"
    part rotation 120 "$python" benchmarks/rotation.py "${common[@]}" --heads 1 --shapes 2x5 \
        --json "$OUT/rotation.json"
    part memory 120 "$python" benchmarks/memory.py "${common[@]}" $unit vit_small_rope_mixed --model-args $tiny \
        --batch 2 --size 32 --precision bf16-autocast --json "$OUT/memory.json"
    part large 120 "${speed[@]}" "${common[@]}" $unit vit_small_rope_axial --model-args $tiny --batch 1 --size 64 \
        --precision bf16-autocast --json "$OUT/speed_large.json"
else
    export STOCK="--model vit_small_rope_mixed --img-size 224 --batch-size 64"
    compiled="$unit vit_small_rope_axial vit_small_rope_mixed vit_small_rope_spherical vit_small_rope_liere"
    compile=(--rounds 7 --steps 5 --batch 256 --precision bf16-autocast --run compile)
    machine 2>&1 | tee -a "$log"
    beside tests 120 bash -c gpu_tests
    beside doctor 100 bash -c doctor
    beside train 100 "$python" benchmarks/train_loop.py vit_tiny_rope_mixed vit_tiny_rope_liere --steps 150 \
        --json "$OUT/train.json"
    beside stock 100 bash -c stock
    for model in $compiled; do
        beside "warm-$model" 120 "${speed[@]}" $model "${compile[@]}" --rounds 1 --steps 1
    done
    finish
    part speed 75 "${speed[@]}" --rounds 7 --steps 5 $unit $ours $ports --batch 256 --precision bf16-autocast \
        --json "$OUT/speed.json"
    part compile 150 "${speed[@]}" $compiled "${compile[@]}" --json "$OUT/speed_compile.json"
    part rotation 40 "$python" benchmarks/rotation.py --json "$OUT/rotation.json"
    part memory 40 "$python" benchmarks/memory.py --precision bf16-autocast --rounds 1 --json "$OUT/memory.json"
    part large 50 "${speed[@]}" --rounds 5 --steps 3 $unit $ours $ports --batch 8 --size 1024 \
        --precision bf16-autocast --json "$OUT/speed_large.json"
fi
echo "== all parts ended after $SECONDS s, status $status" | tee -a "$log"
exit $status
