#!/usr/bin/env bash
# Everything that matters on one GPU, in one run under 9 minutes, files under DIR:
#     bash benchmarks/gpu.sh [--out=DIR] [--toy]
# Ceilings and correctness first, then training, PyTorch side by side, sampling, compiler options, a trace; the tables
# again at the end. A part that fails or takes too long is named and the others go on. --toy: the same at toy size, to
# try the script on a CPU. Needs jax, flax, optax and numpy; torch and transformers for the peer.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=benchmarks/results toy=
for argument in "$@"; do
    case $argument in
        --out=*) out=${argument#--out=} ;;
        --toy) toy=1 ;;
        *)
            echo "error: $argument: no such flag; there are --out=DIR and --toy" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

part() { # name, seconds at most, command
    local name=$1 limit=$2
    shift 2
    printf '\n=== %s (%s)\n' "$name" "$(date +%T)"
    timeout --kill-after=10 "$limit" "$@" || failed+=("$name: exit $?")
}

vs=()
if python -c 'import torch, transformers' 2>/dev/null; then vs=(--vs=torch); else failed+=('the peer: no torch and transformers here'); fi
if [ -n "$toy" ]; then
    part ceilings 60 python benchmarks/ceilings.py --width=512 --seconds=2 --out="$out"
    part correctness 120 python benchmarks/correct.py --case=toy --out="$out"
    part 'train, beside the peer' 120 python benchmarks/train_step.py --cases=toy --seconds=6 --out="$out" "${vs[@]}"
    part 'train, larger' 60 python benchmarks/train_step.py --cases=toy --batch=24 --seconds=2 --out="$out"
    part sampling 120 python benchmarks/sample.py --case=toy --batch=1,8 --prompt=32 --new=16 --seconds=4 --out="$out" "${vs[@]}"
    part 'compiler options' 60 python benchmarks/train_step.py --cases=toy --seconds=2 --out="$out" \
        --xla=';xla_cpu_enable_fast_math=true;xla_no_such_option=true'
    part trace 60 python benchmarks/train_step.py --cases=toy --seconds=1 --trace="$out/trace" --out="$out"
else
    part ceilings 40 python benchmarks/ceilings.py --seconds=6 --out="$out"
    part correctness 70 python benchmarks/correct.py --out="$out"
    part 'train 124M, beside the peer' 110 python benchmarks/train_step.py --cases=small --batch=32 --seconds=15 --out="$out" "${vs[@]}"
    part 'train 124M, larger batch' 60 python benchmarks/train_step.py --cases=small --batch=64 --loss=xla,triton --seconds=5 --out="$out"
    part 'train 350M' 50 python benchmarks/train_step.py --cases=medium --seconds=5 --out="$out"
    part 'train 1558M' 80 python benchmarks/train_step.py --cases=xl --batch=16 --seconds=8 --out="$out"
    part sampling 70 python benchmarks/sample.py --batch=1,256 --prompt=32 --seconds=8 --dtype=bfloat16 --out="$out" "${vs[@]}"
    part 'compiler options' 50 python benchmarks/train_step.py --cases=small --batch=32 --seconds=3 --out="$out" \
        --xla=';xla_gpu_enable_latency_hiding_scheduler=true;xla_gpu_enable_triton_gemm=false;xla_gpu_enable_command_buffer='
    part trace 25 python benchmarks/train_step.py --cases=small --batch=32 --seconds=1 --trace="$out/trace" --out="$out"
fi
printf '\n=== all of it (%s)\n' "$(date +%T)"
python benchmarks/summary.py "$out"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'not measured: %s\n' "${failed[@]}"
    exit 1
fi
