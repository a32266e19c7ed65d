"""What training starts from, by value: stochastic depth, initial weights, parameter groups, exemptions from decay."""

import math

import pytest
import timm
import torch
from test_wrapped_layers import NAMES
from timm.layers import DropPath
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import vicinal.zoo  # noqa: F401

names = pytest.mark.parametrize("name", NAMES)


def create(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs)


# Depths that tell a rate by stage from one by block, and the first block of a stage from the last of the one before.
DEEP = {
    "nat_pico": {"depths": (2, 1, 3, 2)},
    "dinat_pico": {"depths": (1, 2, 2, 3)},
    "dinat_s_tiny": {"embed_dim": 32, "depths": (2, 1, 3, 1), "num_heads": (1, 2, 4, 8), "kernel_size": 3},
    "nat_isotropic_small": {"embed_dim": 32, "num_heads": 2, "depth": 5, "kernel_size": 3},
    "davit_pico_vicinal": {"depths": (1, 2, 1, 1)},
    "maxvit_pico": {"depths": (2, 1, 2, 1)},
    "transnext_pico": {"depths": (2, 1, 2, 1)},
    "biformer_pico": {"depths": (1, 2, 1, 2)},
    "litv2_pico": {"depths": (1, 2, 3, 1)},
    "convit_pico_vicinal": {},
    "shvit_pico_vicinal": {"depths": (2, 3, 2)},
    "halonet_pico": {},
    "lamhalobotnet_pico": {},
}


def list_blocks(name: str, model: nn.Module) -> list[nn.Module]:
    """What one rate is for: a block; of DaViT a spatial or a channel block, which come in pairs."""
    blocks = [block for stage in model.stages for block in stage.blocks]
    return [part for pair in blocks for part in pair] if name.startswith("davit_") else blocks


def branches(name: str, index: int, block: nn.Module) -> int:
    """Residual branches of a block, each of which is dropped by itself."""
    if name.startswith("maxvit_"):
        return 5
    if name.startswith("litv2_"):
        return 1 if block.attn is None else 2
    if name.startswith("shvit_"):
        return 2 if isinstance(block.mixer, nn.Identity) else 3
    return 1 if name.startswith(("halonet_", "lamhalo")) else 2


@pytest.mark.parametrize("name", DEEP)
def test_stochastic_depth_grows_linearly_over_the_blocks(name: str):
    model = create(name, drop_path_rate=0.3, **DEEP[name]).train()
    blocks = list_blocks(name, model)
    for index, (block, rate) in enumerate(zip(blocks, torch.linspace(0, 0.3, len(blocks)).tolist(), strict=True)):
        paths = [module for module in block.modules() if isinstance(module, DropPath)]
        if rate == 0:
            assert not paths
            continue
        calls: list[Tensor] = []
        for path in paths:
            assert path.drop_prob == pytest.approx(rate, abs=1e-7)
            assert path.scale_by_keep
            path.register_forward_hook(lambda _, __, output, calls=calls: calls.append(output))
        model(torch.randn(4, 3, 64, 64))
        assert len(calls) == branches(name, index, block)


@names
def test_no_path_is_dropped_unless_asked_for(name: str):
    assert not any(isinstance(module, DropPath) for module in create(name).modules())


def family_of(name: str) -> str:
    return name.partition("_")[0]


def expected_deviation(name: str, key: str, module: nn.Module) -> float:
    """Deviation of the weights of a layer at the start, as the papers' code draws them."""
    family = family_of(name)
    fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return 0.01 if family in ("halonet", "lamhalobotnet") else 0.02
    if family == "maxvit":
        return 0.02
    if key.endswith(("self_attn.q", "self_attn.kv", "self_attn.qkv")) and family in ("halonet", "lamhalobotnet"):
        return fan_in**-0.5
    if family in ("halonet", "lamhalobotnet", "transnext"):
        return math.sqrt(2 * module.groups / (module.weight.shape[0] * module.kernel_size[0] * module.kernel_size[1]))
    if key.endswith("dwconv"):
        return math.sqrt(2 / 9)
    # torch's default, uniform within 1 / sqrt(fan-in)
    return math.sqrt(1 / (3 * fan_in))


FIXED = (".attn.v", ".attn.pos_proj", ".offset")  # ConViT's start as convolutions, LITv2's samples on the grid


@names
def test_every_layer_is_drawn_with_the_deviation_of_the_paper(name: str):
    model = create(name)
    checked = 0
    for key, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or key.endswith(FIXED) or module.weight.numel() < 500:
            continue
        # the deviation of n numbers is off by its own over sqrt(2 n); five of those
        tolerance = 5 / math.sqrt(2 * module.weight.numel())
        assert module.weight.std().item() == pytest.approx(expected_deviation(name, key, module), rel=tolerance), key
        assert abs(module.weight.mean().item()) <= 5 * module.weight.std().item() / math.sqrt(module.weight.numel())
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any(), key
        checked += 1
    assert checked > 5


# Deviations of tables and embeddings, by the end of their names.
TABLES = {
    "nat_pico": {"relative_position_bias": 0.02},
    "dinat_pico": {"relative_position_bias": 0.02},
    "maxvit_pico": {"relative_position_bias": 0.02},
    "vitrpb_small": {"relative_position_bias": 0.02},
    "convit_pico_vicinal": {"stem.pos_embed": 0.02, "cls_token": 0.02},
    "transnext_pico": {"relative_position_bias": 0.0004, "learnable_tokens": 0.02, "query_embedding": 0.02},
    # of heads of 4, 16 and 24 channels
    "halonet_pico": {"stages.1.blocks.0.self_attn.pos_embed.height_rel": 8**-0.5},
    "lamhalobotnet_pico": {"stages.3.blocks.0.self_attn.pos_embed.width_rel": 24**-0.5},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_drawn_with_the_deviation_of_the_paper(name: str):
    options = {"embed_dim": 64, "depth": 2, "num_heads": 2} if name == "vitrpb_small" else {}
    models = [create(name, **options)] + [timm.create_model(name, **options) for _ in range(2)]
    for ending, deviation in TABLES[name].items():
        values = [value for model in models for key, value in model.named_parameters() if key.endswith(ending)]
        drawn = torch.cat([value.detach().flatten() for value in values])
        assert drawn.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * len(drawn))), ending


@names
def test_norms_begin_as_the_identity_and_residual_branches_as_the_paper_has_them(name: str):
    zero = {"shvit": (".conv.m.bn", ".proj.1.bn", ".pw2.bn"), "halonet": ("conv3_1x1.bn",)}
    zero["lamhalobotnet"] = zero["halonet"]
    for key, module in create(name).named_modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            starts_as_zero = key.endswith(zero.get(family_of(name), "nothing"))
            assert module.weight.eq(0 if starts_as_zero else 1).all(), key
            assert module.bias.eq(0).all(), key


def test_layer_scale_temperature_and_gates_begin_at_their_constants():
    for name, value in (("nat_small", 1e-5), ("nat_base", 1e-5), ("dinat_base", 1e-5)):
        arguments = {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}
        arguments |= {"dilations": (1, 1)} if name.startswith("dinat") else {}
        scales = [x for key, x in create(name, **arguments).named_parameters() if key.endswith("gamma")]
        assert len(scales) == 4
        assert all(torch.equal(scale, torch.full_like(scale, value)) for scale in scales)
    for key, parameter in create("transnext_pico").named_parameters():
        if key.endswith("temperature"):
            torch.testing.assert_close(nn.functional.softplus(parameter), torch.full_like(parameter, 1 / 0.24))
        elif key.endswith("learnable_bias"):
            assert not parameter.any()
    gates = [x for key, x in create("convit_pico_vicinal").named_parameters() if key.endswith("gating_param")]
    assert len(gates) == 4
    assert all(gate.eq(1).all() for gate in gates)


@pytest.mark.parametrize(
    ("num_heads", "rows"),
    [(4, [[-1, -1], [-1, 1], [1, -1], [1, 1]]), (9, [[2 * y, 2 * x] for y in (-1, 0, 1) for x in (-1, 0, 1)])],
)
def test_heads_of_convit_begin_as_the_taps_of_a_convolution(num_heads: int, rows: list[list[int]]):
    model = create("convit_pico_vicinal", num_heads=num_heads, embed_dim=36, locality_strength=0.5)
    projection = model.stages[0].blocks[0].attn.pos_proj
    expected = 0.5 * torch.tensor([[*row, -1] for row in rows], dtype=torch.float32)
    assert torch.equal(projection.weight, expected)
    assert not projection.bias.any()


def layers_of(model: nn.Module, coarse: bool) -> dict[str, int]:
    return group_with_matcher(model.named_parameters(), model.group_matcher(coarse=coarse), reverse=True)


GROUPS = {
    # the stem, then blocks (and stages); a downsampling step is with the block that it feeds, a norm with the last
    "nat_pico": {
        "stem.conv1.weight": (0, 0),
        "stages.0.blocks.0.attn.qkv.weight": (1, 1),
        "stages.1.downsample.conv.weight": (2, 2),
        "stages.1.blocks.0.norm1.weight": (2, 2),
        "stages.2.downsample.norm.bias": (3, 3),
        "stages.2.blocks.0.mlp.fc1.weight": (3, 3),
        "stages.2.blocks.2.mlp.fc1.weight": (5, 3),
        "stages.3.blocks.0.norm2.weight": (6, 4),
        "norm.weight": (6, 5),
        "head.fc.weight": (7, 5),
    },
    "transnext_pico": {
        "stem.norm.weight": (0, 0),
        "stages.0.blocks.0.norm1.weight": (1, 1),
        "stages.0.norm.weight": (1, 1),
        "stages.2.blocks.1.norm1.weight": (4, 3),
        "stages.2.norm.weight": (4, 3),
        "stages.3.blocks.0.norm1.weight": (5, 4),
        "stages.3.norm.weight": (5, 4),
        "head.fc.weight": (6, 5),
    },
    "convit_pico_vicinal": {
        "stem.pos_embed": (0, 0),
        "stages.0.blocks.0.norm1.weight": (1, 1),
        "stages.4.downsample.cls_token": (5, 5),
        "stages.5.blocks.0.norm1.weight": (6, 6),
        "norm.weight": (6, 7),
        "head.fc.weight": (7, 7),
    },
    "halonet_pico": {"stem.conv1.conv.weight": (0, 0), "norm.conv.weight": (5, 5), "head.fc.weight": (6, 5)},
    "biformer_pico": {"stem.conv1.conv.weight": (0, 0), "norm.bn.weight": (5, 5), "head.fc.weight": (6, 5)},
}


@pytest.mark.parametrize("name", GROUPS)
def test_parameters_are_in_the_group_of_their_depth(name: str):
    model = create(name)
    fine, coarse = layers_of(model, False), layers_of(model, True)
    assert set(fine) == set(coarse) == {key for key, _ in model.named_parameters()}
    assert {key: (fine[key], coarse[key]) for key in GROUPS[name]} == GROUPS[name]


@names
def test_groups_count_from_the_stem_through_the_blocks_to_the_head(name: str):
    model = create(name)
    count = sum(len(stage.blocks) for stage in model.stages)
    layers = layers_of(model, False)
    assert sorted(set(layers.values())) == list(range(count + 2))
    assert {layer for key, layer in layers.items() if key.startswith("stem.")} == {0}
    assert {layer for key, layer in layers.items() if key.startswith("norm.")} <= {count}
    assert {layer for key, layer in layers.items() if key.startswith("head.")} == {count + 1}


def test_layer_decay_reaches_every_layer():
    model = create("nat_pico")
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    found = {key: by_id[id(parameter)] for key, parameter in model.named_parameters()}
    scales = {key: group["lr_scale"] for key, group in found.items()}
    assert {key: scales[key] for key in GROUPS["nat_pico"]} == {
        key: 0.5 ** (7 - layer) for key, (layer, _) in GROUPS["nat_pico"].items()
    }
    assert scales["head.fc.weight"] == scales["head.fc.bias"] == 1
    for key, group in found.items():
        exempt = key.endswith((".bias", "relative_position_bias")) or "norm" in key
        assert group["weight_decay"] == (0 if exempt else 0.05), key


NAT_BIASES = {
    f"stages.{stage}.blocks.{block}.attn.relative_position_bias"
    for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0))
}
DINAT_BIASES = {
    f"stages.{stage}.blocks.{block}.attn.relative_position_bias"
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0))
}
MAXVIT_BIASES = {
    f"stages.{stage}.blocks.0.attn_{kind}.attn.relative_position_bias"
    for stage in range(4)
    for kind in ("block", "grid")
}
# The official list: names that contain query_embedding, relative_pos_bias_local, cpb or temperature.
TRANSNEXT = {
    f"stages.{stage}.blocks.{block}.attn.{name}"
    for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
    for name in (
        "query_embedding",
        "temperature",
        "position_bias.fc1.weight",
        "position_bias.fc1.bias",
        "position_bias.fc2.weight",
        "position_bias.fc2.bias",
        *(() if stage == 3 else ("relative_position_bias",)),
    )
}
NO_DECAY = {
    "nat_pico": NAT_BIASES,
    "dinat_pico": DINAT_BIASES,
    "maxvit_pico": MAXVIT_BIASES,
    "transnext_pico": TRANSNEXT,
    "convit_pico_vicinal": {"stem.pos_embed", "stages.4.downsample.cls_token"},
    "davit_pico_vicinal": set(),
    "shvit_pico_vicinal": set(),
    "litv2_pico": set(),
    "biformer_pico": set(),
    "halonet_pico": set(),
    "lamhalobotnet_pico": set(),
}


@names
def test_exemptions_from_weight_decay_are_those_of_the_recipe(name: str):
    model = create(name)
    assert model.no_weight_decay() == NO_DECAY[name]
    assert NO_DECAY[name] <= {key for key, _ in model.named_parameters()}


@names
def test_factors_of_the_learning_rate_are_those_of_the_recipe(name: str):
    offsets = {f"stages.{stage}.downsample.offset.weight": 0.01 for stage in (1, 2, 3)}
    assert create(name).learning_rate_scales() == (offsets if name == "litv2_pico" else {})


RATES = {"drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3}
# Families without one of the options: their papers have no such dropout.
WITHOUT = {"shvit": {"proj_drop_rate", "attn_drop_rate"}}
WITHOUT["halonet"] = WITHOUT["lamhalobotnet"] = WITHOUT["shvit"]


@names
def test_each_dropout_has_its_own_rate_and_place(name: str):
    rates = {key: rate for key, rate in RATES.items() if key not in WITHOUT.get(family_of(name), ())}
    model = create(name, **rates)
    found: dict[str, set[float]] = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            place = "head" if key.startswith("head.") else "weights" if key.endswith("attn_drop") else "projections"
            found.setdefault(place, set()).add(module.p)
    expected = {"head": {0.1}, "projections": {0.2}, "weights": {0.3}}
    if "proj_drop_rate" not in rates:
        expected = {"head": {0.1}}
    assert found == expected
    if "proj_drop_rate" in rates:
        mixers = [key for key, module in model.named_modules() if key.endswith("proj_drop") and module.p == 0.2]
        mlps = [key for key, module in model.named_modules() if ".mlp.drop" in key and module.p == 0.2]
        # DaViT's attention between channels and stages without attention have none
        assert len(mlps) >= len(mixers) > 0


# eps of the norms of every kind, by family; timm's own norm-and-activation layers count as batch norms.
EPS = {
    "nat_pico": {"LayerNorm": {1e-5}},
    "dinat_s_tiny": {"LayerNorm": {1e-5}},
    "nat_isotropic_small": {"LayerNorm": {1e-5}},
    "vitrpb_small": {"LayerNorm": {1e-5}},
    "davit_pico_vicinal": {"LayerNorm": {1e-5}},
    "maxvit_pico": {"LayerNorm": {1e-5}, "BatchNorm": {1e-3}},
    "litv2_pico": {"LayerNorm": {1e-5}, "BatchNorm": {1e-5}},
    "convit_pico_vicinal": {"LayerNorm": {1e-6}},
    "biformer_pico": {"LayerNorm": {1e-6}, "BatchNorm": {1e-5}},
    "biformer_stl": {"LayerNorm": {1e-6}, "BatchNorm": {1e-5}},
    "shvit_pico_vicinal": {"GroupNorm": {1e-5}, "BatchNorm": {1e-5}},
    "halonet_pico": {"BatchNorm": {1e-5}},
    "lamhalobotnet_pico": {"BatchNorm": {1e-5}},
}


@pytest.mark.parametrize("name", EPS)
def test_norms_have_the_eps_of_the_official_code(name: str):
    found: dict[str, set[float]] = {}
    for module in timm.create_model(name, device="meta").modules():
        kind = next((kind for kind in ("LayerNorm", "GroupNorm", "BatchNorm") if kind in type(module).__name__), None)
        if kind and hasattr(module, "eps"):
            found.setdefault(kind, set()).add(module.eps)
            assert kind != "BatchNorm" or module.momentum == 0.1
    assert found == EPS[name]


@names
def test_features_are_those_of_the_last_stages(name: str):
    count = len(timm.create_model(name, device="meta").stages)
    levels = 3 if family_of(name) in ("shvit", "convit") else 4
    backbone = timm.create_model(name, features_only=True, device="meta")
    assert backbone.feature_info.module_name() == [f"stages.{index}" for index in range(count - levels, count)]


def test_the_attentive_probe_begins_as_its_paper_has_it():
    model = create("attentive_probe", backbone="nat_pico")
    for values, deviation in ((model.head.pool.queries, 0.02), (model.head.fc.weight, 0.01)):
        assert values.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * values.numel()))
    assert not model.head.fc.bias.any()
    assert model.head.norm.eps == 1e-6
    assert not model.head.norm.affine
    assert model.head.pool.value.bias is None
    assert model.head.pool.scale == model.num_features**-0.5
    assert len(model.head.pool.queries) == 32
    assert model.no_weight_decay() == {"head.pool.queries"}
