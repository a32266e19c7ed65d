"""These tests run on a GPU, or with TRITON_INTERPRET=1: kernels are interpreted then, on CPU tensors."""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

torch.set_num_threads(1)


def check_numpy() -> None:
    """Triton's interpreter before 3.7 turns arrays of one element into numbers, which numpy 2.4 no longer does."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise pytest.UsageError(
            f"the interpreter of triton {triton.__version__} needs numpy < 2.4, and numpy is {np.__version__}: "
            "pip install 'numpy<2.4', or triton>=3.7"
        )


def repair_bfloat16_products() -> None:
    """The interpreter holds bfloat16 as raw bits, and its dot multiplies these (triton-lang/triton issue 11584)."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def to_float32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def repaired(self, left, right, *rest):
        return create_dot(self, to_float32(left), to_float32(right), *rest)

    interpreter.InterpreterBuilder.create_dot = repaired


if os.environ.get("TRITON_INTERPRET") == "1":
    check_numpy()
    repair_bfloat16_products()
else:
    torch.set_default_device("cuda")  # before the test modules make tensors of their own
