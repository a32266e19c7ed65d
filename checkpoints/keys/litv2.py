"""LITv2: the layout of ziplab/LITv2, of its classification code."""

from . import Layout, next_stage

OFFICIAL = Layout(
    mark=r"layers\.|patch_embed\.",
    rules=(
        (r"^patch_embed\.proj\.", "stem.conv."),
        (r"^patch_embed\.norm\.", "stem.norm."),
        (r"^layers\.(\d+)\.downsample\.dconv\.conv_offset\.", next_stage("downsample.offset.")),
        (r"^layers\.(\d+)\.downsample\.dconv\.", next_stage("downsample.conv.")),
        (r"^layers\.(\d+)\.downsample\.norm_layer\.", next_stage("downsample.norm.")),
        (r"^layers\.", "stages."),
        (r"\.attn\.h_", ".attn.high."),
        (r"\.attn\.l_", ".attn.low."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^head\.", "head.fc."),
    ),
)

LAYOUTS = (OFFICIAL,)
