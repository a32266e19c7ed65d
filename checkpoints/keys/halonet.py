"""HaloNet: timm's layout (``byoanet``), whose stages are the sequences of their blocks."""

from . import Layout

TIMM = Layout(
    mark=r"stages\.\d+\.\d+\.|final_conv\.",
    rules=(
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^final_conv\.", "norm."),
    ),
)

LAYOUTS = (TIMM,)
