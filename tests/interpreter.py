"""Runs the `test_interpreted_*` of a file in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from swim.kernels.backend import HAS_TRITON, INTERPRETED

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")


if INTERPRETED:
    # A GPU's minimum and maximum forget NaN unless told otherwise; numpy's, which the interpreter takes, do not.
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    # A float argument is a scalar tensor on a GPU, as an integer is here.
    _convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda arg: (
        tl.tensor(TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        if isinstance(arg, float)
        else _convert(arg)
    )


def run_interpreted(file: str, *, least: int = 10) -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.__version__ >= "2.4":
        pytest.skip("Triton 3.6's interpreter takes int() of an array, which numpy 2.4 refuses")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-500:]
    assert int(passed[1]) >= least, done.stdout[-500:]
