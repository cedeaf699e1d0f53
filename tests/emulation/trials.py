"""What the tests of the emulation share: when they run, and operands of the trials (trials.h)."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from emulation import COMPILER

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


def numbers(count: int) -> np.ndarray:
    """Distinct whole numbers, whose sums are exact."""
    return np.random.default_rng(count).permutation(count).astype(np.float32) - count // 2
