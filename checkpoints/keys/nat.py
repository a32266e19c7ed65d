"""NAT, DiNAT, DiNAT_s and the isotropic variants: layouts of SHI-Labs/Neighborhood-Attention-Transformer."""

from . import Layout, next_stage

_BLOCK = (
    (r"\.attn\.rpb$", ".attn.relative_position_bias"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.", "head.fc."),
)

PYRAMID = Layout(
    mark=r"levels\.",
    rules=(
        (r"^patch_embed\.proj\.0\.", "stem.conv1."),
        (r"^patch_embed\.proj\.1\.", "stem.embed.conv."),
        (r"^patch_embed\.norm\.", "stem.embed.norm."),
        (r"^levels\.(\d+)\.downsample\.reduction\.", next_stage("downsample.conv.")),
        (r"^levels\.(\d+)\.downsample", next_stage()),
        (r"^levels\.", "stages."),
        *_BLOCK,
    ),
)

SWIN_LIKE = Layout(
    mark=r"layers\.\d+\.(blocks|downsample)\.",
    rules=(
        (r"^patch_embed\.proj\.", "stem.conv."),
        (r"^patch_embed\.norm\.", "stem.norm."),
        (r"^layers\.(\d+)\.downsample", next_stage()),
        (r"^layers\.", "stages."),
        *_BLOCK,
    ),
)

ISOTROPIC = Layout(
    mark=r"layers\.\d+\.(norm1|norm2|attn|mlp)\.",
    rules=(
        (r"^patch_embed\.proj\.", "stem.conv."),
        (r"^patch_embed\.norm\.", "stem.norm."),
        (r"^layers\.(\d+)\.", r"stages.\1.blocks.0."),
        *_BLOCK,
    ),
    dropped=(r"\.relative_position_index$",),
)

LAYOUTS = (PYRAMID, SWIN_LIKE, ISOTROPIC)
