#!/usr/bin/env bash
# Measures on this machine's GPU, after tests/gpu.sh has built; writes benchmarks/results/cuda.json and
# triton.json, and copies of them to OUT (default: out).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
mkdir -p "$out"
export PYTHONPATH=$PWD
for backend in cuda triton; do
  PYDIFFUSE_BACKEND=$backend python3 -m benchmarks --device cuda --out "benchmarks/results/$backend.json" || true
  cp "benchmarks/results/$backend.json" "$out/"
done
