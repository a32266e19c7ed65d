"""DaViT: the layout of dingmyu/davit. timm's own layout is ours."""

from . import Layout

OFFICIAL = Layout(
    mark=r"main_blocks\.",
    rules=(
        (r"^patch_embeds\.0\.proj\.", "stem.conv."),
        (r"^patch_embeds\.0\.norm\.", "stem.norm."),
        (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
        (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
        (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"^norms\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ),
)

LAYOUTS = (OFFICIAL,)
