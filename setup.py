"""Builds the native library: CPU kernels always, CUDA kernels if nvcc is found and works.

The library uses only LibTorch's stable ABI: one build loads in every torch >= 2.11, for any Python, with or without
CUDA. It is an operator library, not a Python extension module, and is built by a ninja file that native_build/ writes.

Environment (an empty variable is an unset one):
    ALEXNET_KERNELS_CUDA    1: build CUDA kernels, or fail; 0: build none; unset: build them if there is a CUDA toolkit
                            (12.4 or later) that compiles and links, else warn and build the CPU kernels
    ALEXNET_KERNELS_ARCHS   CUDA architectures; if unset TORCH_CUDA_ARCH_LIST, by default "8.0;9.0a;10.0+PTX". Those
                            that nvcc doesn't know are left out
    CUDA_HOME               the CUDA toolkit, if nvcc isn't on PATH
    CXX, CXXFLAGS           the C++ compiler and additional flags
    MAX_JOBS                number of parallel compilations; 0: ninja's choice
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # isolated builds have no current folder there

from native_build.commands import AnyPythonWheel, BinaryDistribution, NinjaBuild

setup(
    ext_modules=[Extension("alexnet_kernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
    distclass=BinaryDistribution,
)
