"""Neighborhood attention against NATTEN, whose pure-PyTorch path computes the forward pass of every variant."""

import importlib
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from operator_testing import describe, random_inputs

from vicinal.kernels import backend, neighborhood_attention

pytestmark = pytest.mark.slow

VERSION = "0.21.6"
CACHE = Path(__file__).parents[2] / ".cache" / f"natten-{VERSION}"


@dataclass(frozen=True)
class Variant:
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    map: tuple[int, ...]


VARIANTS = [
    Variant((7,), (1,), (1,), (False,), (33,)),
    Variant((5,), (2,), (3,), (False,), (32,)),
    Variant((6,), (4,), (3,), (True,), (35,)),
    Variant((7, 7), (1, 1), (1, 1), (False, False), (14, 16)),
    Variant((3, 7), (1, 1), (4, 2), (False, False), (15, 17)),  # dilation leaves remainders
    Variant((4, 6), (1, 1), (1, 1), (False, False), (9, 13)),
    Variant((4, 2), (3, 2), (2, 3), (False, False), (13, 11)),
    Variant((5, 5), (5, 3), (1, 2), (False, False), (12, 14)),
    Variant((4, 4), (4, 4), (1, 1), (False, False), (12, 8)),
    Variant((5, 3), (1, 1), (2, 3), (True, False), (13, 10)),
    Variant((5, 4), (2, 3), (2, 1), (True, True), (13, 10)),
    Variant((8, 8), (1, 1), (1, 1), (False, False), (8, 8)),
    Variant((3, 3, 3), (1, 1, 1), (1, 2, 1), (False, False, False), (5, 7, 6)),
    Variant((2, 4, 3), (2, 1, 3), (2, 1, 1), (False, True, False), (6, 5, 7)),
]


@pytest.fixture(scope="module")
def natten():
    """Installed beside the environment, without compiler and dependencies: it must not replace torch."""
    if not (CACHE / "natten").is_dir():
        CACHE.parent.mkdir(exist_ok=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
        subprocess.run([*install, "--target", str(CACHE), f"natten=={VERSION}"], check=True)
    sys.path.insert(0, str(CACHE))
    try:
        yield importlib.import_module("natten")
    finally:
        sys.path.remove(str(CACHE))


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("variant", [pytest.param(variant, id=describe(variant)) for variant in VARIANTS])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_equals_natten(natten, variant: Variant, name: str) -> None:
    options = asdict(variant)
    spatial = options.pop("map")
    query, key, value = random_inputs((2, *spatial, 2, 16), torch.float32)
    expected = getattr(natten, f"na{len(spatial)}d")(query, key, value, backend="flex-fna", **options)
    with backend(name):
        found = neighborhood_attention(query, key, value, **options)
    # Both round to float32: scores of size 4 have an error of a few 1e-7, weights and outputs one like it.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
