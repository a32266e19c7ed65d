"""The models. Importing this module registers them with timm: ``timm.create_model("nat_mini")``."""

from timm import create_model, list_models

from .accelerate import accelerate
from .biformer import BiFormer
from .convit import ConViT
from .davit import DaViT
from .halonet import HaloNet
from .litv2 import LITv2
from .maxvit import MaxViT
from .nat import IsotropicNeighborhoodTransformer, NeighborhoodTransformer
from .probe import AttentiveProbe
from .shvit import SHViT
from .transnext import TransNeXt

__all__ = [
    "AttentiveProbe",
    "BiFormer",
    "ConViT",
    "DaViT",
    "HaloNet",
    "IsotropicNeighborhoodTransformer",
    "LITv2",
    "MaxViT",
    "NeighborhoodTransformer",
    "SHViT",
    "TransNeXt",
    "accelerate",
    "create_model",
    "list_models",
]
