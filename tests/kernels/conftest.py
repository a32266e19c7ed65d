"""The tests in fused/ need a GPU, or Triton's interpreter in the whole process, as in test_fused_interpreter.py."""

import os

import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["fused"]
