#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and runs the tests of hostile and random
# arguments with them, for each instruction set of this processor. Arguments are pytest's: --fuzz 10, say.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
cxx=${CXX:-g++}
build=build/sanitized
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all"
# Checks as calls, which compile in half the time of inline checks.
flags="-O1 -g1 --param asan-instrumentation-with-call-threshold=0"
ALEXNET_KERNELS_CUDA=0 CXX="$cxx $sanitizers" CXXFLAGS="$flags ${CXXFLAGS:-}" \
  "$python" setup.py -q build --build-base "$build" --build-lib "$build/lib" --build-temp "$build/objects"

tests=$PWD/tests
cd "$build/lib"  # whose package Python finds first
export OMP_NUM_THREADS=1
# Python and torch keep memory until the process ends. torch's own libraries allocate and free by different functions.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0
export UBSAN_OPTIONS=print_stacktrace=1
runtime="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
for isa in generic avx2 avx512; do
  grep -q "$isa" /proc/cpuinfo || [ "$isa" = generic ] || continue
  echo "instruction set $isa"
  # A process that a sanitizer ends prints nothing that pytest captured.
  ALEXNET_KERNELS_ISA=$isa LD_PRELOAD="$runtime" \
    "$python" -m pytest -q --capture=sys -p no:cacheprovider "$tests/test_operands.py" "$tests/test_fuzz.py" -k cpu "$@" \
    2>stderr || { grep -m 1 -A 60 "runtime error: \|ERROR: AddressSanitizer" stderr >&2 || tail -n 60 stderr >&2; exit 1; }
done
