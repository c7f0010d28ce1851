#!/usr/bin/env bash
# Builds for this machine's GPU and runs every test that needs one; the python3 here must have torch,
# triton, pytest, ninja, pybind11 and setuptools. OUT (default: out) takes the logs.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
mkdir -p "$out"
export PYTHONPATH=$PWD PYDIFFUSE_TEST_GPU=1
arch=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
PYDIFFUSE_CUDA=1 PYDIFFUSE_CUDA_ARCHS=$arch python3 setup.py -q build_ext --inplace || exit 1
python3 -m pydiffuse info
python3 -m pytest tests/test_guidance.py tests/test_adaln.py tests/test_attention.py tests/test_attention_transforms.py tests/test_routing.py tests/test_scan.py tests/test_scan_transforms.py tests/test_nn.py tests/test_transforms.py tests/test_gpu.py --junitxml "$out/gpu-test.xml"
status=$?
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m pytest tests/test_gpu.py -k sanitize ||
      { echo "compute-sanitizer $tool found something"; status=1; }
  done
fi
exit $status
