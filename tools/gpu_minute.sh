#!/usr/bin/env bash
# What one GPU can tell in nine minutes, in order of value. It needs torch for CUDA, nvcc and pytest, and no network.
#
#     bash tools/gpu_minute.sh --collect-wheels DIR          before, with a network: packages that such a machine lacks
#     bash tools/gpu_minute.sh --wheels DIR --out OUT        there: all parts that nine minutes have room for
#     bash tools/gpu_minute.sh --only c,d --minutes 4        these parts alone, in less time
#     bash tools/gpu_minute.sh --dry-run                     every part at a toy size, on a CPU
#     python tools/gpu_minute_report.py OUT/gpu_minute.tar.gz       afterwards: docs/benchmarks/DATE-gpu.md
#
#     a  the CUDA library, for this GPU alone; megadiff doctor
#     b  correctness: kernels against definitions; eight steps of six objectives against a CPU's losses; a kill
#     c  the row loss and the fused head against cross-entropy, compiled losses and copy bandwidth
#     d  steps of 3B- and 7B-shaped layers: MFU, memory against the plan, and where the time goes
#     e  samplers; attention under masks
#     f  Transformer Engine's layers, attention and FP8, where it is installed
#
# Each part has a time limit, and what it has written by then counts: everything lies in OUT/gpu_minute.tar.gz, which is
# written anew every ten seconds. Without kernels for this GPU no part but a is worth its time, and none is begun. OUT is $OUT or gpu_minute by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

only=a,b,c,d,e,f minutes='' out=${OUT:-gpu_minute} wheels='' collect='' dry=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --dry-run) dry=1; shift; continue ;;
        --only | --minutes | --out | --wheels | --collect-wheels)
            [ -n "${2:-}" ] || die "$1 has no value: give one as $1 VALUE" ;;
        *) die "unknown argument $1: --help lists them" ;;
    esac
    case $1 in
        --only) only=$2 ;;
        --minutes) minutes=$2 ;;
        --out) out=$2 ;;
        --wheels) wheels=$2 ;;
        --collect-wheels) collect=$2 ;;
    esac
    shift 2
done
[[ $only =~ ^[a-f](,[a-f])*$ ]] || die "--only is $only, but must be letters from a to f, joined by commas"
# A dry run is not about time: a CPU may be slow, and busy.
patience=${dry:+8}
minutes=${minutes:-$((9 * ${patience:-1}))}
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--minutes is $minutes, but must be a number of minutes"

# What megadiff needs beside the packages that come with torch and transformers.
if [ -n "$collect" ]; then
    mkdir -p "$collect"
    megatron=$(sed -n 's/^ *"\(megatron-core==[0-9.]*\)".*/\1/p' pyproject.toml)
    platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d "$collect" "$megatron" packaging psutil pyyaml safetensors ||
        die "pip could not download them for Python 3.12: see its message above"
    mebibytes=$(du -sm "$collect" | cut -f1)
    [ "$mebibytes" -le 40 ] || die "$collect holds $mebibytes MiB, but only 40 are to travel: remove what is not needed"
    echo "$collect holds $mebibytes MiB"
    exit
fi

mkdir -p "$out"
work=$(mktemp -d)
results=$work/results
mkdir "$results"
deadline=$((SECONDS + $(awk "BEGIN { printf \"%d\", 60 * $minutes }")))
running=''
least=${dry:+5}
least=${least:-25} # seconds; in fewer nothing is imported, compiled and measured

save() { # each process into a file of its own; tar's 1 is a log that grew meanwhile
    local made=$out/.gpu_minute.$BASHPID
    tar -C "$work" --warning=no-file-changed -czf "$made" results || [ $? -eq 1 ] || return
    mv "$made" "$out/gpu_minute.tar.gz"
}
keep_saving() { while sleep 10; do save || true; done; }
keep_saving &
saver=$!
finish() {
    kill $saver $running 2>/dev/null || true
    wait $saver $running 2>/dev/null || true
    save && rm -rf "$work" "$out"/.gpu_minute.*
}
trap finish EXIT
trap 'exit 143' TERM INT

echo "part,name,limit_s,seconds,exit_code" >"$results/parts.csv"
[ -z "$dry" ] || echo "toy sizes, on a CPU" >"$results/dry-run"

# part LETTER NAME LIMIT COMMAND…: its output goes into NAME.log; 124 and 137 are the exit codes of one that was stopped.
part() {
    local letter=$1 name=$2 limit=$3 left=$((deadline - SECONDS)) started=$SECONDS code=0
    shift 3
    case ,$only, in *,$letter,*) ;; *) return ;; esac
    limit=$((limit * ${patience:-1}))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt "$least" ]; then
        printf '%s  %-12s no time left\n' "$letter" "$name"
        echo "$letter,$name,0,0,124" >>"$results/parts.csv"
        return
    fi
    # In the background, so that a signal to this script is answered at once; timeout passes it on to the command.
    timeout --kill-after 5 "$limit" "$@" >"$results/$name.log" 2>&1 &
    running=$!
    wait $running || code=$?
    running=''
    echo "$letter,$name,$limit,$((SECONDS - started)),$code" >>"$results/parts.csv"
    printf '%s  %-12s %4d s of %4d, exit code %d\n' "$letter" "$name" $((SECONDS - started)) "$limit" $code
    [ $code -eq 0 ] || tail -n 12 "$results/$name.log" | sed 's/^/       /'
}

if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$wheels"/*.whl || die "no wheels in $wheels"
fi
export PYTHONPATH=$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-8}

build() { # beside the sources, or on a dry run apart from them, where others may be in use
    if [ -n "$dry" ]; then
        MEGADIFF_BUILD=cpu "$python" setup.py -q build_ext --build-lib "$work/build" --build-temp "$work/build"
    else
        MEGADIFF_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
        [ "$MEGADIFF_CUDA_ARCHS" != 90 ] || MEGADIFF_CUDA_ARCHS=90a
        export MEGADIFF_CUDA_ARCHS
        "$python" setup.py -q build_ext --inplace
        "$python" -m megadiff doctor --require-library cuda # setup.py itself warns of what it cannot build
    fi
}
doctor() {
    nvidia-smi || true
    nproc
    if [ -n "$dry" ]; then "$python" -m megadiff doctor; else "$python" -m megadiff doctor --require cuda; fi
}
export -f build doctor
export python dry work

kernels=(tests/gpu/test_row_loss_on_gpu.py tests/gpu/test_head_loss_on_gpu.py)
attention=(tests/gpu/test_fused_on_gpu.py tests/gpu/test_attention_on_gpu.py)
engine=(tests/gpu/test_transformer_engine_on_gpu.py)
# References are computed on the CPU. Outcomes are printed one by one, for a stop to leave them.
tests=(env OMP_NUM_THREADS=8 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -v --tb=short -p no:cacheprovider)
tests+=(--durations 10 -m gpu)
ops=("$python" tools/benchmark_ops.py --output-dir "$results")
ours=(megadiff "megadiff in place" cross-entropy)
train=("$python" tools/benchmark_train.py --output-dir "$results")
golden=("$python" tools/gpu_minute_golden.py)
if [ -z "$dry" ]; then
    ops+=(--device cuda --noise masked hybrid --repetitions 7)
    grid=(--vocab-size 32768 131072 --rows 256 1024 8192 --only "${ours[@]}")
    compiled=(--vocab-size 131072 --rows 1024 8192 --only megadiff "dense compiled" "cross-entropy compiled")
    head=(--vocab-size 131072 --rows 8192 --head --hidden-size 3072)
    train+=(--precision bf16 --rounds 2 --warm-up 6)
    steps=("hybrid, fused head" "masked, fused head" "cross-entropy, fused")
else
    tests+=(--collect-only) # what has no toy size: that finds what cannot be imported
    golden+=(--toy)
    ops+=(--device cpu --noise hybrid --repetitions 1 --threads 1)
    grid=(--vocab-size 300 --rows 8 16 --only "${ours[@]}")
    compiled=(--vocab-size 300 --rows 8 --only megadiff "dense compiled" "cross-entropy compiled")
    head=(--vocab-size 300 --rows 8 --head --hidden-size 16)
    train+=(--precision bf16 --rounds 1 --warm-up 0 --vocab-size 300)
    train+=(--model.num-layers=1 --model.hidden-size=32 --model.num-attention-heads=4 --model.num-query-groups=2)
    train+=(--model.ffn-hidden-size=64 --data.sequence-length=16)
    train+=(--training.global-batch-size=4 --training.micro-batch-size=2)
    steps=("hybrid, fused head" "cross-entropy, fused")
fi
in_bf16=(--dtype bfloat16) in_fp32=(--dtype float32)
profile=(--part profile --shape 3b-layers --model.fused-head-loss=true --warm-up 0)
[ -n "$dry" ] || profile+=(--training.global-batch-size=16)

# In order of value, whatever the letters: the limits are more than nine minutes, and what does not fit falls out at the end.
part a build 90 bash -euo pipefail -c build
part a doctor 30 bash -euo pipefail -c doctor
[ -n "$dry" ] || case ,$only, in
    *,a,*) grep -q '^a,doctor,.*,0$' "$results/parts.csv" || only=none ;;
esac
part b kernels 90 "${tests[@]}" "${kernels[@]}"
part b golden-fp32 60 "${golden[@]}" --precision fp32 --output "$results/golden-fp32.jsonl"
part d steps-3b 75 "${train[@]}" --part step --shape 3b-layers --contender "${steps[@]}" --output-dir "$results/steps-3b"
part c rows 40 "${ops[@]}" "${in_bf16[@]}" "${grid[@]}" --output-dir "$results/rows"
part c compiled 60 "${ops[@]}" "${in_bf16[@]}" "${compiled[@]}" --output-dir "$results/compiled"
part d steps-7b 75 "${train[@]}" --part step --shape 7b-layers --contender "${steps[@]}" --output-dir "$results/steps-7b"
part d profile 70 "${train[@]}" "${profile[@]}" --output-dir "$results/profile"
part b attention 60 "${tests[@]}" "${attention[@]}"
part c head 25 "${ops[@]}" "${in_bf16[@]}" "${head[@]}" --output-dir "$results/head"
part b golden-bf16 60 "${golden[@]}" --precision bf16 --output "$results/golden-bf16.jsonl"
part e sampling 60 "$python" tools/gpu_minute_sampling.py --output "$results"
part b resume 60 "${golden[@]}" --resume --output "$results/resume.jsonl"
if [ -n "$dry" ] || "$python" -c 'import transformer_engine.pytorch' 2>/dev/null; then
    part f engine 120 "${tests[@]}" "${engine[@]}"
    part f fp8 75 "${train[@]}" --part step --shape 3b-layers --contender "${steps[@]}" --output-dir "$results/fp8" \
        --precision "$([ -n "$dry" ] && echo fp8-emulated || echo fp8)"
fi
part c rows-fp32 45 "${ops[@]}" "${in_fp32[@]}" "${grid[@]}" --output-dir "$results/rows"

! cut -d, -f5 "$results/parts.csv" | grep -qx '[1-9][0-9]*'
