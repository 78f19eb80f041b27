#!/usr/bin/env bash
# Everything that matters on one GPU, in one call of at most 560 seconds; results in one flat folder:
#     bash benchmarks/gpu.sh [--out=DIR] [--deadline=540] [--only=PART,PART] [--toy]
# Needs the packages of gpu-image.txt, and for the parts that run gptjax.main what gpu_carry.py fetched; gpu.py says more.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec python3 -u benchmarks/gpu.py "$@"
