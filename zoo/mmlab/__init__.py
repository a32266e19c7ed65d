"""Our models, and timm's, in MMDetection and MMSegmentation.

A config reaches this module by ``custom_imports = dict(imports=["vicinal.zoo.mmlab"])``. Importing it registers the
models with timm, offers the operators that MMCV wants compiled, and registers with MMEngine, for both libraries:
``VicinalBackbone``, the necks, ``Float32RoIExtractor``, ``AutocastOptimWrapper`` and the constructor of parameter
groups. It needs the ``detection`` extra, and nothing else of ours imports it.
"""

from . import operators

# before anything imports mmcv.ops: some modules remember a failed import
operators.install()

from .. import create_model  # noqa: E402, F401 (registers the models)
from .backbone import VicinalBackbone, convert_backbone  # noqa: E402
from .neck import ExtendedFPN, RescaledPyramid  # noqa: E402
from .optim import AutocastOptimWrapper, BackboneOptimWrapperConstructor  # noqa: E402

__all__ = [
    "AutocastOptimWrapper",
    "BackboneOptimWrapperConstructor",
    "ExtendedFPN",
    "RescaledPyramid",
    "VicinalBackbone",
    "convert_backbone",
    "operators",
]
