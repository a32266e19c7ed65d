"""SHViT: the layouts of ysj9909/SHViT and of timm."""

from . import Layout

_ENDS = (
    (r"^patch_embed\.", "stem."),
    (r"^head\.", "head.fc."),
    (r"^head_dist\.", "head.fc_dist."),
)

# the downsampling step is items 0, 1 and 2 of the stage that it opens, the first and last of them pairs
OFFICIAL = Layout(
    mark=r"blocks[123]\.",
    convolutions=r"\.c\.weight$|\.se\.fc[12]\.weight$",
    rules=(
        *_ENDS,
        (r"^blocks1\.", "stages.0.blocks."),
        (r"^blocks([23])\.0\.([01])\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.{match[2]}."),
        (r"^blocks([23])\.1\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.2."),
        (r"^blocks([23])\.2\.([01])\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.{int(match[2]) + 3}."),
        (r"^blocks([23])\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 3}."),
    ),
)

TIMM = Layout(mark=r"patch_embed\.|head\.(bn|l)\.", rules=_ENDS)

LAYOUTS = (OFFICIAL, TIMM)
