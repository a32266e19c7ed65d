"""A family of your own, from outside the package: one file with the network, its key map and its table.

Import it beside ``vicinal.zoo``; what timm asks of a model (features, pruning, parameter groups, re-initialisation,
folders that ``local-dir:`` rebuilds) comes from ``Backbone``, and weights of the foreign layout load strictly.
"""

from collections.abc import Sequence
from functools import partial

import timm
import torch
from timm.layers import ClassifierHead, LayerNorm, calculate_drop_path_rates
from torch import nn

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import Layout, convert
from vicinal.zoo.backbone import Backbone, Stage, build_backbone, checkpoint_filter_fn
from vicinal.zoo.blocks.attention import NeighborhoodAttention, WindowAttention
from vicinal.zoo.blocks.embed import ConvEmbed
from vicinal.zoo.blocks.transformer import TransformerBlock
from vicinal.zoo.names import Variant, default_cfgs_of, register_variants

__all__ = ["TwoViews", "checkpoint_filter_fn"]

# The layout of the repository that the weights come from: a key that only it has, and how its names become ours.
PUBLISHED = Layout(
    mark=r"body\.",
    rules=(
        (r"^patch\.", "stem."),
        (r"^body\.(\d+)\.down\.", r"stages.\1.downsample."),
        (r"^body\.(\d+)\.", r"stages.\1.blocks."),
        (r"^classifier\.", "head.fc."),
    ),
)


class TwoViews(Backbone):
    """Window attention and neighborhood attention in turn.

    Args:
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        window_size: side of a window, and of a neighbourhood less one.
    """

    layouts = (PUBLISHED,)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] = (2, 2, 2),
        window_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)

        def block(stage: int, index: int) -> nn.Module:
            dim, heads = embed_dims[stage], embed_dims[stage] // 32
            if index % 2:
                attention = NeighborhoodAttention(dim, heads, window_size + 1, **dd)
            else:
                attention = WindowAttention(dim, heads, window_size, **dd)
            return TransformerBlock(dim, attention, drop_path=rates[stage][index], **dd)

        stages = [
            Stage(
                [block(stage, index) for index in range(depth)],
                ConvEmbed(embed_dims[stage - 1], embed_dims[stage], 2, 2, multiple=2, **dd) if stage else None,
            )
            for stage, depth in enumerate(depths)
        ]
        super().__init__(
            stem=ConvEmbed(in_chans, embed_dims[0], 4, 4, image=True, multiple=4, **dd),
            stages=stages,
            norm=LayerNorm(embed_dims[-1], **dd),
            head=ClassifierHead(
                embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
            ),
            widths=embed_dims,
            reductions=[4 * 2**stage for stage in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            output_fmt="NHWC",
        )


VARIANTS = {"two_views_nano": Variant({}, {"input_size": (3, 64, 64), "pool_size": (4, 4)})}

default_cfgs = default_cfgs_of(VARIANTS, first_conv="stem.conv", license="mit")

register_variants(__name__, VARIANTS, partial(build_backbone, TwoViews, feature_levels=3))


def main() -> None:
    model = timm.create_model("two_views_nano", num_classes=10).eval()
    print(model(torch.randn(1, 3, 50, 70)).shape)
    published = {
        key.replace("stem.", "patch.")
        .replace("downsample.", "down.")
        .replace("blocks.", "")
        .replace("stages.", "body.")
        .replace("head.fc.", "classifier."): value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(convert("two_views_nano", published))
    pyramid = timm.create_model("two_views_nano", features_only=True)
    print([tuple(feature.shape) for feature in pyramid(torch.randn(1, 3, 64, 96))])
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    print(program.module()(torch.randn(5, 3, 64, 64)).shape)


if __name__ == "__main__":
    main()
