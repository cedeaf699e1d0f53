#!/usr/bin/env bash
# Builds the library in place for the GPU present, then checks and times everything on it: scripts/gpu_check.sh OUT
# Needs nvcc, a C++ compiler, torch and ninja; no network, no installation. Without a GPU it runs on the CPU.
# Other arguments are passed to python -m alexnet_kernels.gpu_check; scripts/gpu_check.sh --help lists them.
set -euo pipefail
case "${1:-}" in
  "")
    echo "usage: $0 OUT [--minutes N] [--from PART | --only PART ...] [--library FILE]" >&2
    exit 2
    ;;
  -*) out=() ;;
  *)
    out=(--out "$1")
    shift
    ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# It builds the library itself.
exec "${PYTHON:-python3}" -W "ignore:PyTorch's operators compute all ops" -m alexnet_kernels.gpu_check "${out[@]}" "$@"
