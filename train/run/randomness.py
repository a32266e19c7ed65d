"""Random streams keyed by counters, so that no generator's state has to be saved.

Every random draw of a run happens right after its generator was seeded with a key made of counters: the order of an
epoch from (seed, epoch), the changes to one image from (seed, epoch, index, repeat), and dropout, mixing and erasing of
one batch from (seed, epoch, batch, rank). A run that starts again at any of these points therefore draws the same
numbers, whatever ran before, in whichever process.
"""

import hashlib
import random
import struct

import numpy as np
import torch


def stream_seed(purpose: str, *counters: int) -> int:
    """A 63-bit seed that depends on the purpose and on every counter, in order."""
    packed = purpose.encode() + struct.pack(f"<{len(counters)}q", *counters)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_host(seed: int) -> None:
    """Seed the host generators: Python's, NumPy's and torch's for the CPU."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed the host generators and those of CUDA devices in use."""
    seed_host(seed)
    # torch.manual_seed takes half a millisecond where CUDA is not in use: it notes a stack trace for later.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
