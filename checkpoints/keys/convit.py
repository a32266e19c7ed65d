"""ConViT: the layout of facebookresearch/convit, which timm has too."""

from . import Layout

OFFICIAL = Layout(
    mark=r"blocks\.|patch_embed\.",
    rules=(
        (r"^patch_embed\.proj\.", "stem.conv."),
        (r"^pos_embed$", "stem.pos_embed"),
        # of every official variant: the class token joins before the eleventh block
        (r"^cls_token$", "stages.10.downsample.cls_token"),
        (r"^blocks\.(\d+)\.", r"stages.\1.blocks.0."),
        (r"^head\.", "head.fc."),
    ),
)

LAYOUTS = (OFFICIAL,)
