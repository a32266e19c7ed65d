"""What is said of one released checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReleasedWeights:
    """One released checkpoint.

    Attributes:
        url: address of the file, or empty where it lies on the Hugging Face Hub.
        hf_hub_id: repository on the Hub, or empty.
        num_classes: rows of its classifier.
        top1: published ImageNet-1k top-1 accuracy in percent; None where none was published (22k pre-training).
        license: SPDX name of the licence of the weights.
        origin: the repository that released it.
        sha256: hash of the file, where known.
        cfg: entries of timm's pretrained configuration that differ from the variant's, such as the input size.
    """

    url: str = ""
    hf_hub_id: str = ""
    num_classes: int = 1000
    top1: float | None = None
    license: str = "mit"
    origin: str = ""
    sha256: str = ""
    cfg: Mapping[str, Any] = field(default_factory=dict)
