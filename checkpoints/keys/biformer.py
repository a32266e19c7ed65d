"""BiFormer: the layouts of rayleizhu/BiFormer, of its main code and of both forms of the Swin-tiny layout."""

from . import Layout

_ATTENTION_AND_ENDS = (
    (r"\.pos_embed\.", ".cpe1.proj."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^norm\.", "norm.bn."),
    (r"^head\.", "head.fc."),
)

MAIN = Layout(
    mark=r"stages\.\d+\.\d+\.",
    rules=(
        (r"^downsample_layers\.0\.0\.", "stem.conv1.conv."),
        (r"^downsample_layers\.0\.1\.", "stem.conv1.bn."),
        (r"^downsample_layers\.0\.3\.", "stem.embed.conv."),
        (r"^downsample_layers\.0\.4\.", "stem.embed.norm.bn."),
        (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
        (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.norm.bn."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        *_ATTENTION_AND_ENDS,
    ),
)

SWIN_TINY = Layout(
    mark=r"stages\.\d+\.blocks\.\d+\.mlp\.0\.",
    matrices=r"\.(qkv|qkv_linear|proj|output_linear|mlp\.[02])\.weight$",
    rules=(
        (r"^downsample_layers\.0\.0\.", "stem.conv."),
        (r"^downsample_layers\.0\.1\.", "stem.norm.bn."),
        (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.norm.bn."),
        (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.conv."),
        *_ATTENTION_AND_ENDS,
    ),
)

LAYOUTS = (MAIN, SWIN_TINY)
