#!/usr/bin/env bash
# Measures on this machine's GPU, after tests/gpu.sh has built: benchmarks/results/cuda.json has every op on
# the backend that serves it, triton.json the families that have both on Triton. Copies go to OUT (default: out).
#
#   benchmarks/gpu.sh [stem]...          all by default
#   SECONDS_BENCH                        after which a run is stopped (default: 400)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
mkdir -p "$out" && out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
stems=${*:-guidance scan attention adaln routing patch}

measure() {  # backend or nothing, name of the JSON, stems
  local name=$2
  PYDIFFUSE_BACKEND=$1 timeout -k 10 "${SECONDS_BENCH:-400}" python3 -m benchmarks --device cuda --quick \
    --out "benchmarks/results/$name.json" ${@:3}
  cp "benchmarks/results/$name.json" "$out/"
}

measure "" cuda $stems
both=$(echo "$stems" | tr ' ' '\n' | grep -xE 'guidance|scan' | tr '\n' ' ')
[ -z "$both" ] || measure triton triton $both
