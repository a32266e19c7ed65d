"""The tests in fused/ need Triton's interpreter in the whole process; test_fused_interpreter.py starts one for them."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["fused"]
