"""Every fact that the golden files record of the official networks, against ours as they are built.

Most of them leave no trace in the shapes of parameters: dilations, windows, layer scale, eps of norms, the routes of a
region, how images are prepared. Each has a reader here; one without is an error.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import timm
from golden import Golden, list_golden
from timm.models import get_pretrained_cfg
from timm.models.byobnet import ByoBlockCfg
from torch import nn

import vicinal.zoo  # noqa: F401
from vicinal.zoo import halonet
from vicinal.zoo.blocks.attention import GlobalAttention, NeighborhoodAttention, PackedAttention, WindowAttention
from vicinal.zoo.blocks.gated import GatedPositionalAttention
from vicinal.zoo.blocks.routed import RoutedAttention

FAMILIES = ("nat", "dinat", "davit", "shvit", "litv2", "maxvit", "transnext", "convit", "halonet", "biformer")

Reader = Callable[[nn.Module], Any]


def build(golden: Golden) -> nn.Module:
    model = timm.create_model(golden.name, device="meta", **golden.model_args)
    model.cfg = get_pretrained_cfg(golden.name)
    return model


def is_isotropic(model: nn.Module) -> bool:
    return len(model.stages) > 4


def blocks(model: nn.Module) -> list[list[nn.Module]]:
    """By stage, with the pairs of DaViT and the parts of MaxViT opened."""
    stages = [list(stage.blocks) for stage in model.stages]
    return [
        [part for block in stage for part in (block if type(block) is nn.Sequential else [block])] for stage in stages
    ]


def mixers(model: nn.Module, kind: type[nn.Module] = nn.Module) -> list[list[nn.Module]]:
    attentions = [[block.attn for block in stage if getattr(block, "attn", None)] for stage in blocks(model)]
    return [[attn for attn in stage if isinstance(attn, kind)] for stage in attentions]


def only(values: Any) -> Any:
    """The one value of all."""
    found = set(values)
    assert len(found) == 1, found
    return found.pop()


def widths(model: nn.Module) -> list[int]:
    return [level["num_chs"] for level in model.feature_info]


def heads(model: nn.Module, kind: type[nn.Module] = nn.Module) -> list[int]:
    return [only(attn.num_heads for attn in stage) for stage in mixers(model, kind) if stage]


def mlp_ratio(model: nn.Module) -> float:
    mlps = [(block, block.mlp) for stage in blocks(model) for block in stage if hasattr(block, "mlp")]
    return only(mlp.fc1.out_features / mlp.fc1.in_features for _, mlp in mlps)


def norm_eps(model: nn.Module) -> float:
    return only(norm.eps for stage in blocks(model) for block in stage for norm in (block.norm1, block.norm2) if norm)


def layer_scale(model: nn.Module) -> float | None:
    scales = [module.init_values for module in model.modules() if hasattr(module, "gamma")]
    return only(scales) if scales else None


def dilations(model: nn.Module) -> list[list[int]]:
    return [[only(attn.dilation) for attn in stage] for stage in mixers(model, NeighborhoodAttention)]


def kernel_size(model: nn.Module) -> int | None:
    found = [only(attn.kernel_size) for stage in mixers(model, NeighborhoodAttention) for attn in stage]
    assert bool(found) != bool([attn for stage in mixers(model, GlobalAttention) for attn in stage])
    return only(found) if found else None


def has_qkv_bias(model: nn.Module, name: str = "qkv") -> bool:
    return only(
        getattr(attn, name).bias is not None for stage in mixers(model) for attn in stage if hasattr(attn, name)
    )


def stride_of_stem(model: nn.Module) -> int:
    return model.feature_info[0]["reduction"]


def routed(model: nn.Module) -> list[list[nn.Module]]:
    return [stage for stage in mixers(model, RoutedAttention) if stage]


def batch_norm_eps(model: nn.Module) -> float:
    return only(module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d))


COMMON: dict[str, Reader] = {
    "default_input": lambda model: list(model.cfg.input_size),
    "input_size": lambda model: list(model.cfg.input_size),
    "pool_size": lambda model: list(model.cfg.pool_size),
    "mean": lambda model: list(model.cfg.mean),
    "std": lambda model: list(model.cfg.std),
    "crop_pct": lambda model: model.cfg.crop_pct,
    "interpolation": lambda model: model.cfg.interpolation,
    "depths": lambda model: [len(stage.blocks) for stage in model.stages],
    "embed_dims": widths,
    "layer_scale": layer_scale,
}

_NAT: dict[str, Reader] = {
    "embed_dim": lambda model: widths(model)[0],
    "num_heads": lambda model: only(heads(model)) if is_isotropic(model) else heads(model),
    "mlp_ratio": mlp_ratio,
    "kernel_size": kernel_size,
    "dilations": dilations,
    "qkv_bias": has_qkv_bias,
    "norm": lambda model: {1e-5: "LayerNorm eps 1e-5"}[norm_eps(model)],
    "depth": lambda model: len(model.stages),
    "patch_size": stride_of_stem,
    "in_chans": lambda model: model.in_chans,
    "img_size": lambda model: model.cfg.input_size[-1],
    "norm_layer": lambda model: type(model.norm).__name__,
    "patch_norm": lambda model: hasattr(model.stem.norm, "weight"),
    "layer": lambda model: (
        "NATransformerLayer" if any(mixers(model, NeighborhoodAttention)) else "VisionTransformerLayer"
    ),
    # the odd blocks' of the isotropic networks
    "dilation": lambda model: (
        only(stage[0] for stage in dilations(model)[1::2]) if any(mixers(model, NeighborhoodAttention)) else None
    ),
}

READERS: dict[str, dict[str, Reader]] = {
    "nat": _NAT,
    "dinat": _NAT,
    "davit": {
        "patch_size": stride_of_stem,
        "window_size": lambda model: only(only(attn.window_size) for s in mixers(model, WindowAttention) for attn in s),
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
        "overlapped_patch": lambda model: model.stages[1].downsample.conv.kernel_size != (2, 2),
        "qkv_bias": has_qkv_bias,
        "norm": lambda model: {1e-5: "LayerNorm eps 1e-5"}[norm_eps(model)],
        "attention_types": lambda model: [
            "spatial" if isinstance(attn, WindowAttention) else "channel" for attn in mixers(model)[0]
        ],
    },
    "convit": {
        "embed_dim": lambda model: only(widths(model)),
        "num_heads": lambda model: only(heads(model)),
        "depth": lambda model: len(model.stages),
        "mlp_ratio": mlp_ratio,
        "local_up_to_layer": lambda model: sum(map(len, mixers(model, GatedPositionalAttention))),
        "locality_strength": lambda model: only(
            attn.locality_strength for stage in mixers(model, GatedPositionalAttention) for attn in stage
        ),
        "qkv_bias": lambda model: has_qkv_bias(model) or has_qkv_bias(model, "qk") or has_qkv_bias(model, "v"),
        "patch_size": stride_of_stem,
        "use_pos_embed": lambda model: hasattr(model.stem, "pos_embed"),
        "norm": lambda model: {1e-6: "LayerNorm eps 1e-6"}[only([norm_eps(model), model.norm.eps])],
    },
    "shvit": {
        "embed_dim": widths,
        "depth": lambda model: [len(stage.blocks) for stage in model.stages],
        # the stage without attention has a figure all the same
        "types": lambda model: [
            "i" if isinstance(stage.blocks[0].mixer, nn.Identity) else "s" for stage in model.stages
        ],
        "mlp_ratio": lambda model: only(
            block.ffn.m.pw1.c.out_channels / block.ffn.m.pw1.c.in_channels for stage in blocks(model) for block in stage
        ),
        "norm": lambda model: {(1e-5, 1e-5): "BatchNorm (eps 1e-5), GroupNorm(1 group, eps 1e-5) inside SHSA"}[
            batch_norm_eps(model), only(module.eps for module in model.modules() if isinstance(module, nn.GroupNorm))
        ],
        "act": lambda model: only(
            type(module).__name__.lower()
            for stage in model.stages
            for module in stage.blocks.modules()
            if "LU" in type(module).__name__
        ),
    },
    "litv2": {
        "embed_dim": lambda model: widths(model)[0],
        "num_heads": lambda model: [width // 32 for width in widths(model)],
        "alpha": lambda model: only(
            (attn.low.num_heads if attn.low else 0) / (widths(model)[2] // 32) for attn in mixers(model)[2]
        ),
        "local_ws": lambda model: [
            only(attn.window_size[0] for attn in stage) if stage else 0 for stage in mixers(model)
        ],
        "mlp_ratio": mlp_ratio,
        "has_msa": lambda model: [int(bool(stage)) for stage in mixers(model)],
        "norm": lambda model: {1e-5: "LayerNorm eps 1e-5"}[norm_eps(model)],
    },
    "maxvit": {
        "embed_dim": widths,
        "stem_width": lambda model: model.stem.conv2.out_channels,
        "stem_bias": lambda model: model.stem.conv1.bias is not None and model.stem.conv2.bias is not None,
        "head_hidden_size": lambda model: model.head_hidden_size,
    },
    "transnext": {
        "num_heads": heads,
        "sr_ratios": lambda model: [only(getattr(attn, "reduction", 1) for attn in stage) for stage in mixers(model)],
        "window_size": lambda model: [only(getattr(attn, "window_size", None) for attn in s) for s in mixers(model)],
        "mlp_ratios": lambda model: [
            next(
                ratio
                for ratio in (4, 8)
                if all(block.mlp.fc2.in_features == int(2 * int(width * ratio) / 3) for block in stage)
            )
            for stage, width in zip(blocks(model), widths(model), strict=True)
        ],
        "patch_size": stride_of_stem,
        "qkv_bias": lambda model: has_qkv_bias(model, "q") and has_qkv_bias(model, "kv"),
        "head_dim": lambda model: only(w // h for w, h in zip(widths(model), heads(model), strict=True)),
    },
    "biformer": {
        "n_win": lambda model: only(only(attn.grid) for stage in routed(model) for attn in stage),
        "head_dim": lambda model: only(
            attn.qkv.in_features // attn.num_heads for stage in routed(model) for attn in stage
        ),
        "side_dwconv": lambda model: only(
            attn.lepe.kernel_size[0] for stage in mixers(model, PackedAttention) for attn in stage
        ),
        "norm_eps": norm_eps,
        "bn_eps": batch_norm_eps,
        "mlp_ratio": mlp_ratio,
        "heads_bra": lambda model: heads(model, RoutedAttention),
        "heads_stage4": lambda model: only(attn.num_heads for attn in mixers(model)[3]),
        "before_attn_dwconv": lambda model: only(
            block.cpe1.proj.kernel_size[0] if hasattr(block.cpe1, "proj") else 0
            for stage in blocks(model)
            for block in stage
        ),
        "final_norm": lambda model: type(model.norm.bn).__name__,
        "mlp_dwconv": lambda model: any("dwconv" in name for name, _ in model.named_modules()),
    },
    "halonet": {},
}
# Sentences, and what the recipes hold and their tests pin. ``fixed_input_size`` and ``min_input_size`` are limits of
# timm's, which ours do without. ``kv_downsample`` is an option that is off.
ELSEWHERE = {
    "stem", "downsample", "head", "note", "mlp", "qk_scale", "act", "block_norm", "kv_downsample",
    "drop_path_rate", "drop_path_default", "drop_path_source", "drop_rate", "attn_drop_rate",
    "fixed_input_size", "min_input_size", "architecture", "tag", "weight_init", "block_type",
}  # fmt: skip
PARTS = {"topks", "partial_dim", "qk_dim", "conv_cfg", "transformer_cfg", "norm"}  # tested by parts below


def readers_of(golden: Golden) -> dict[str, Reader]:
    return {**COMMON, **READERS[golden.data["family"]]}


@pytest.mark.parametrize("golden", list_golden(*FAMILIES), ids=repr)
def test_every_fact(golden: Golden):
    model, readers, facts = build(golden), readers_of(golden), golden.data["facts"]
    if golden.data["family"] == "halonet":
        assert_configuration(golden)
        facts = {key: value for key, value in facts.items() if key in COMMON}
    unread = set(facts) - set(readers) - ELSEWHERE - PARTS
    assert not unread
    read = {key: readers[key](model) for key in facts if key in readers}
    expected = {key: facts[key] for key in read}
    if "alpha" in read:  # of a whole number of heads, the share is rounded down
        assert int(facts["alpha"] * (widths(model)[2] // 32)) == read.pop("alpha") * (widths(model)[2] // 32)
        expected.pop("alpha")
    assert read == expected


def assert_configuration(golden: Golden) -> None:
    """Of timm's byoanet: our network is built from the same configuration."""
    cfg = halonet.VARIANTS[golden.name].model_args["cfg"]
    facts = golden.data["facts"]
    unread = set(facts) - set(asdict(cfg)) - set(COMMON) - ELSEWHERE
    assert not unread
    for key, value in facts.items():
        if key == "blocks":
            assert plain(cfg.blocks) == value
        elif hasattr(cfg, key) and key != "fixed_input_size":
            assert (getattr(cfg, key) or None) == (value or None), key


def plain(part: Any) -> Any:
    """Block configurations as the golden files list them."""
    if isinstance(part, ByoBlockCfg):
        return asdict(part)
    return [plain(inner) for inner in part]


@pytest.mark.parametrize("golden", list_golden("shvit"), ids=repr)
def test_channels_that_attend(golden: Golden):
    model, facts = build(golden), golden.data["facts"]
    for stage, partial_dim, key_dim, kind in zip(
        blocks(model), facts["partial_dim"], facts["qk_dim"], facts["types"], strict=True
    ):
        for block in stage if kind == "s" else ():
            assert block.mixer.m.splits[0] == partial_dim
            assert block.mixer.m.qkv_splits == [key_dim, key_dim, partial_dim]
            assert block.mixer.m.scale == key_dim**-0.5


@pytest.mark.parametrize("golden", list_golden("biformer"), ids=repr)
def test_routes_of_a_region_and_scales(golden: Golden):
    model, topks = build(golden), golden.data["facts"]["topks"]
    for stage, topk, width in zip(mixers(model), topks, widths(model), strict=True):
        for attn in stage:
            # -1 and -2 are the official code's numbers for attention to everything
            assert (attn.topk if isinstance(attn, RoutedAttention) else -1) == max(topk, -1)
            if isinstance(attn, RoutedAttention):
                assert attn.scale == width**-0.5


@pytest.mark.parametrize("golden", list_golden("maxvit"), ids=repr)
def test_parts_of_maxvit(golden: Golden):
    model, facts = build(golden), golden.data["facts"]
    conv, transformer = facts["conv_cfg"], facts["transformer_cfg"]
    for (first, *others), width in zip(
        ([s.conv for s in stage.blocks] for stage in model.stages), widths(model), strict=True
    ):
        for block in (first, *others):
            assert block.conv1_1x1.out_channels == conv["expand_ratio"] * width
            assert block.se.fc1.out_channels == conv["attn_ratio"] * width
            assert block.conv2_kxk.kernel_size == (conv["kernel_size"],) * 2
            assert isinstance(block.se.bn, nn.Identity)
            assert isinstance(block.se.fc1, nn.Conv2d)
            assert type(block.se.act).__name__ == "SiLU"
            assert (block.conv3_1x1.bias is not None) == conv["output_bias"]
        assert first.conv2_kxk.stride == (2, 2)
    assert batch_norm_eps(model) == conv["norm_eps"]
    attentions = [attn for stage in mixers(model, WindowAttention) for attn in stage]
    assert only(attn.qkv.in_features // attn.num_heads for attn in attentions) == transformer["dim_head"]
    assert (
        only(tuple(attn.window_size) for attn in attentions)
        == (facts["input_size"][1] // transformer["partition_ratio"],) * 2
    )
    assert [attn.partition for attn in attentions] == ["block", "grid"] * (len(attentions) // 2)
    transformers = [block for stage in blocks(model) for block in stage if hasattr(block, "attn")]
    assert (
        only(block.mlp.fc1.out_features / block.mlp.fc1.in_features for block in transformers)
        == transformer["expand_ratio"]
    )
    assert only(norm.eps for block in transformers for norm in (block.norm1, block.norm2)) == transformer["norm_eps"]
    assert only(type(block.mlp.act).__name__ for block in transformers) == "GELUTanh"
    assert has_qkv_bias_of(attentions) == transformer["attn_bias"]


def has_qkv_bias_of(attentions: list[nn.Module]) -> bool:
    return only(attn.qkv.bias is not None and attn.proj.bias is not None for attn in attentions)


@pytest.mark.parametrize("golden", list_golden("transnext"), ids=repr)
def test_norms_of_transnext(golden: Golden):
    """Three of them have torch's eps and the others 1e-6."""
    model = build(golden)
    eps = {1e-5: set(), 1e-6: set()}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            eps[module.eps].add(name)
    assert {name.rpartition(".")[2] for name in eps[1e-5]} == {"norm", "pool_norm"}
    assert {name.split(".")[-2] for name in eps[1e-5]} == {"stem", "downsample", "attn"}
    assert {name.rpartition(".")[2] for name in eps[1e-6]} == {"norm1", "norm2", "norm"}
    assert len([name for name in eps[1e-6] if name.endswith(".norm")]) == len(model.stages)
