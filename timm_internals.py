"""What we take from timm's private modules, in one place, so that an upgrade that moves it fails here by name.

timm has no public door to these: the getter of intermediate features and its index rule, the bookkeeping after a model
changed its input size, parameter groups by a matcher, and the writer of a hub folder's config.json.
tests/test_internals.py holds each.
"""

from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import save_config_for_hf
from timm.models._input import update_model_input_size
from timm.models._manipulate import group_with_matcher

__all__ = [
    "FeatureGetterNet",
    "feature_take_indices",
    "group_with_matcher",
    "save_config_for_hf",
    "update_model_input_size",
]
