"""Weights that the authors of each family released: where they lie, under which licence, what they reach.

One module per family, named as its file in the zoo, with ``RELEASED``: entries by timm's ``architecture.tag``. The
accuracies are the authors' own, on the ImageNet-1k validation set at the size in ``cfg``, or the variant's native one.
``sha256`` stays empty where the authors give no hash; the files are read with ``weights_only=True`` anyway.
"""

import importlib
import pkgutil

from .entry import ReleasedWeights

__all__ = ["RELEASED", "ReleasedWeights"]

_FAMILIES = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "entry")

RELEASED: dict[str, ReleasedWeights] = {
    tag: weights
    for family in _FAMILIES
    for tag, weights in importlib.import_module(f".{family}", __name__).RELEASED.items()
}
