"""MaxViT: timm's layout of the ``maxvit_*_tf`` models, which differs from ours in the name of the bias tables."""

from . import Layout

TIMM = Layout(
    mark=r".*\.rel_pos\.relative_position_bias_table$",
    rules=((r"\.rel_pos\.relative_position_bias_table$", ".relative_position_bias"),),
)

LAYOUTS = (TIMM,)
