#!/usr/bin/env bash
# Builds for this machine's GPU, unless the extension holds code for it already, and runs the tests on it:
# every backend, every op. The python3 here must have torch, triton and pytest, and to build ninja, pybind11
# and setuptools; with pytest-xdist the tests run side by side. OUT (default: out) takes the logs.
#
#   tests/gpu.sh [test | sanitize]...    both by default
#   SECONDS_TEST, SECONDS_SANITIZE       after which a part is stopped (default: 300, 150)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
mkdir -p "$out" && out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYDIFFUSE_TEST_GPU=1 PYTHONUNBUFFERED=1
export PYDIFFUSE_FAILURES=$out/gpu-failures.txt
status=0

if ! python3 -c 'import sys, pydiffuse; sys.exit(pydiffuse.backends()["tcfg"]["cuda"] != "ready")' 2>/dev/null; then
  arch=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
  PYDIFFUSE_CUDA=1 PYDIFFUSE_CUDA_ARCHS=$arch python3 setup.py -q build_ext --inplace || exit 1
fi
python3 -m pydiffuse info | tee "$out/gpu-info.txt"

beside() {  # options of pytest for several processes, where it can
  python3 -c 'import xdist' 2>/dev/null && echo "-n ${JOBS:-$(($(nproc) - 2))} --dist worksteal --max-worker-restart 50"
}

if [ $# -eq 0 ]; then set -- test sanitize; fi
for part in "$@"; do
  case $part in
    test)
      # test_build compiles; test_lower_cpu_capabilities and test_examples are about the CPU.
      timeout -k 20 -s INT "${SECONDS_TEST:-300}" python3 -m pytest tests $(beside) --ignore tests/test_build.py \
        --ignore tests/test_examples.py -k "not lower_cpu" --durations 15 -p no:cacheprovider \
        --junitxml "$out/gpu-test.xml" 2>&1 | tee "$out/gpu-test.log" || status=1
      python3 tests/gpu_report.py "$out/gpu-test.xml"
      ;;
    sanitize)
      for tool in memcheck racecheck; do
        timeout "${SECONDS_SANITIZE:-150}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
          python3 -m pytest tests/test_gpu.py -k sanitize -p no:cacheprovider 2>&1 |
          tee "$out/gpu-$tool.log" || { echo "compute-sanitizer $tool: see $out/gpu-$tool.log"; status=1; }
      done
      ;;
  esac
done
exit $status
