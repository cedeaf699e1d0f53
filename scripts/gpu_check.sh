#!/usr/bin/env bash
# Builds the library in place for the GPU present, then checks and times everything on it: scripts/gpu_check.sh OUT
# Needs nvcc, a C++ compiler, torch and ninja; no network, no installation. Without a GPU it runs on the CPU.
# More arguments go to python -m alexnet_kernels.testing.gpu_check.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: $0 OUT [--minutes N] [--only PART ...]" >&2
  exit 2
fi
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
if [ -n "$arch" ]; then
  export ALEXNET_KERNELS_CUDA=1 ALEXNET_KERNELS_ARCHS="$arch"
fi
status=0
"$python" setup.py build_ext --inplace || status=1
if [ $status -ne 0 ]; then
  echo "$0: the build failed; what was built before, if anything, is checked" >&2
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -m alexnet_kernels.testing.gpu_check --out "$out" "$@" || status=1
exit $status
