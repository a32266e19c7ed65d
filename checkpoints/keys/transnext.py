"""TransNeXt: the layout of DaiShiResearch/TransNeXt, of its classification code and of its dense-task copies."""

from collections.abc import Callable
from re import Match

from . import Layout


def _stage(suffix: str) -> Callable[[Match], str]:
    """Their stages count from 1."""
    return lambda match: f"stages.{int(match[1]) - 1}.{suffix}"


OFFICIAL = Layout(
    mark=r"(patch_embed|block|norm)[1-4]\.",
    rules=(
        (r"^patch_embed1\.proj\.", "stem.conv."),
        (r"^patch_embed1\.norm\.", "stem.norm."),
        (r"^patch_embed(\d)\.proj\.", _stage("downsample.conv.")),
        (r"^patch_embed(\d)\.norm\.", _stage("downsample.norm.")),
        (r"^block(\d)\.", _stage("blocks.")),
        (r"^norm(\d)\.", _stage("norm.")),
        (r"\.attn\.relative_pos_bias_local$", ".attn.relative_position_bias"),
        (r"\.attn\.cpb_fc([12])\.", r".attn.position_bias.fc\1."),
        (r"\.attn\.sr\.", ".attn.pool_proj."),
        (r"\.attn\.norm\.", ".attn.pool_norm."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^head\.", "head.fc."),
    ),
)

LAYOUTS = (OFFICIAL,)
