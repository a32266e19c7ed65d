"""The backbone adapter: maps, freezing, norms, checkpointing, weights of every kind; parameter groups and autocast."""

import pytest
import timm
import torch
import torch.distributed as dist
from dense_samples import build_small, detection_batch
from golden import FOLDER, Golden
from timm.layers import SyncBatchNormAct
from torch import nn

from vicinal.checkpoints import save, save_model
from vicinal.zoo.mmlab import (
    AutocastOptimWrapper,
    BackboneOptimWrapperConstructor,
    ExtendedFPN,
    RescaledPyramid,
    VicinalBackbone,
)
from vicinal.zoo.mmlab.backbone import convert_backbone
from vicinal.zoo.mmlab.weights import convert_detector

SMALL = [
    "nat_pico",
    "dinat_pico",
    "davit_pico_vicinal",
    "maxvit_pico",
    "transnext_pico",
    "litv2_pico",
    "halonet_pico",
    "shvit_pico_vicinal",
    "resnet10t",
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("model", SMALL)
def test_maps_cover_an_image_of_any_size(model: str):
    backbone = VicinalBackbone(model, input_multiple=64).eval()
    maps = backbone(torch.randn(2, 3, 75, 110))
    sizes = [(-(-75 // stride), -(-110 // stride)) for stride in backbone.reductions]
    assert [tuple(x.shape[2:]) for x in maps] == sizes
    assert [x.shape[1] for x in maps] == backbone.channels
    assert len(maps) == (3 if model.startswith("shvit") else 4)


def test_an_init_cfg_draws_what_is_not_loaded():
    backbone = VicinalBackbone("nat_pico", init_cfg={"type": "Constant", "layer": "Linear", "val": 0.5})
    stem = backbone.model.stem.conv1.weight.clone()
    backbone.init_weights()
    assert (backbone.model.stages[0].blocks[0].mlp.fc1.weight == 0.5).all()
    assert torch.equal(backbone.model.stem.conv1.weight, stem)


def test_both_libraries_build_it_by_its_name():
    from mmdet.registry import MODELS as DETECTION
    from mmseg.registry import MODELS as SEGMENTATION

    for registry in (DETECTION, SEGMENTATION):
        built = registry.build({"type": "VicinalBackbone", "model": "nat_pico", "out_indices": (1, -1)})
        assert built.channels == [64, 256]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, "nat_pico has 4 stages"),
        ({"output_norm": "batch"}, "output_norm"),
        ({"output_norm": ("layer", None)}, "each of 4 maps"),
    ],
)
def test_bad_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VicinalBackbone("nat_pico", **options)


def test_output_norms_are_one_for_each_map_that_has_one():
    backbone = VicinalBackbone("litv2_pico", output_norm=(None, "layer", "layer", "layer")).eval()
    raw = VicinalBackbone("litv2_pico").eval()
    raw.model.load_state_dict(backbone.model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    normed, plain = backbone(image), raw(image)
    assert torch.equal(normed[0], plain[0])
    for x, y in zip(normed[1:], plain[1:], strict=True):
        torch.testing.assert_close(x, nn.functional.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2))


@pytest.mark.parametrize("indices", [(1, 2, 3), (3, 1)])
def test_norms_of_a_checkpoint_go_to_the_maps_of_their_stages(indices: tuple):
    """The authors' norm2 is that of stage 2, which is the second map of three."""
    source = VicinalBackbone("nat_pico", output_norm="layer")
    official = {f"backbone.{key}": value for key, value in source.model.state_dict().items()}
    for stage, width in enumerate(source.channels):
        official |= {f"backbone.norm{stage}.{part}": torch.rand(width) for part in ("weight", "bias")}
    model = nn.Module()
    model.backbone = VicinalBackbone("nat_pico", out_indices=indices, output_norm="layer")
    wanted = {key: value for key, value in official.items() if ".norm0." not in key}
    wanted = {
        key: value
        for key, value in wanted.items()
        if "norm" not in key.split(".")[1] or int(key.split(".")[1][4]) in indices
    }
    converted = convert_detector(model, wanted)
    assert set(converted) == set(model.state_dict())
    for place, stage in enumerate(indices):
        for part in ("weight", "bias"):
            assert torch.equal(
                converted[f"backbone.output_norms.{place}.{part}"], official[f"backbone.norm{stage}.{part}"]
            )


def test_images_are_padded_at_the_right_and_the_bottom():
    """A map of a padded image is that of the image with zeros after its last rows and columns, cut to size."""
    padded, plain = VicinalBackbone("resnet10t", input_multiple=64).eval(), VicinalBackbone("resnet10t").eval()
    plain.load_state_dict(padded.state_dict())
    image = torch.randn(1, 3, 75, 110)
    whole = torch.zeros(1, 3, 128, 128)
    whole[:, :, :75, :110] = image
    for x, y, stride in zip(padded(image), plain(whole), padded.reductions, strict=True):
        assert torch.equal(x, y[:, :, : -(-75 // stride), : -(-110 // stride)])


@pytest.mark.parametrize("model", ["nat_pico", "resnet10t"])
def test_frozen_stages_neither_learn_nor_drop_paths(model: str):
    backbone = VicinalBackbone(model, frozen_stages=2, drop_path_rate=0.5).train()
    sum(x.sum() for x in backbone(torch.randn(2, 3, 64, 64))).backward()
    learning = {name for name, value in backbone.model.named_parameters() if value.grad is not None}
    frozen = {name for name, _ in backbone.model.named_parameters()} - learning
    stage = {"nat_pico": "stages.{}.", "resnet10t": "layer{}."}[model]
    first = 0 if model == "nat_pico" else 1
    assert any(name.startswith(stage.format(first + 1)) for name in frozen)
    assert not any(name.startswith((stage.format(first), stage.format(first + 1))) for name in learning)
    assert any(name.startswith(stage.format(first + 2)) for name in learning)
    evaluating = {name for name, module in backbone.model.named_modules() if not module.training}
    assert any("drop_path" in name for name in evaluating)
    assert not any(name.startswith(stage.format(first + 2)) for name in evaluating)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval_keeps_running_statistics(norm_eval: bool):
    backbone = VicinalBackbone("resnet10t", norm_eval=norm_eval).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    kept = all(torch.equal(before[name], value) for name, value in backbone.named_buffers())
    assert kept is norm_eval


def test_checkpointing_stores_less_and_gives_the_same_gradients():
    image = torch.randn(1, 3, 64, 64)
    stored, gradients = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        backbone = VicinalBackbone("nat_pico", grad_checkpointing=enabled).train()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            loss = sum(x.square().sum() for x in backbone(image))
        loss.backward()
        stored.append(sum(sizes))
        gradients.append([value.grad for value in backbone.parameters()])
    assert stored[1] < 0.7 * stored[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_sync_bn_keeps_the_activations_inside_timms_batch_norms(tmp_path):
    plain = VicinalBackbone("halonet_pico", sync_bn=True).eval()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in plain.modules())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        synchronised = VicinalBackbone("halonet_pico", sync_bn=True).eval()
    finally:
        dist.destroy_process_group()
    assert any(isinstance(module, SyncBatchNormAct) for module in synchronised.modules())
    assert not any(type(module) is nn.BatchNorm2d for module in synchronised.modules())
    synchronised.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for x, y in zip(plain(image), synchronised(image), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("model", SMALL)
def test_maps_come_in_the_order_asked_for(model: str):
    backbone, ordered = (VicinalBackbone(model, out_indices=indices).eval() for indices in ((2, 0, 1), (0, 1, 2)))
    backbone.model.load_state_dict(ordered.model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    maps, expected = backbone(x), ordered(x)
    assert [found.shape[1] for found in maps] == backbone.channels == [ordered.channels[place] for place in (2, 0, 1)]
    assert all(torch.equal(maps[place], expected[stage]) for place, stage in enumerate((2, 0, 1)))


def test_each_output_norm_meets_the_map_of_its_place():
    plain = VicinalBackbone("nat_pico", out_indices=(1, 2, 3)).eval()
    normed = VicinalBackbone("nat_pico", out_indices=(1, 2, 3), output_norm=(None, "layer", "layer")).eval()
    normed.model.load_state_dict(plain.model.state_dict())
    for norm in normed.output_norms[1:]:
        assert norm.eps == 1e-5
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(1, 3, 64, 96)
    first, *others = plain(x)
    maps = normed(x)
    assert torch.equal(maps[0], first)
    for found, before, norm in zip(maps[1:], others, normed.output_norms[1:], strict=True):
        tokens = before.permute(0, 2, 3, 1)
        expected = nn.functional.layer_norm(tokens, (before.shape[1],), norm.weight, norm.bias, 1e-5)
        # a norm in float32 over some hundred channels
        torch.testing.assert_close(found, expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_published_norms_are_those_of_their_stage():
    """``norm3`` of a file belongs to the last of the maps (1, 2, 3), which is the third."""
    backbone = VicinalBackbone("nat_pico", out_indices=(1, 2, 3), output_norm="layer")
    published = {f"model.{key}": value for key, value in backbone.model.state_dict().items()}
    widths = {1: 64, 2: 128, 3: 256}
    published |= {f"norm{stage}.weight": torch.full((width,), float(stage)) for stage, width in widths.items()}
    published |= {f"norm{stage}.bias": torch.full((width,), -float(stage)) for stage, width in widths.items()}
    converted = convert_backbone("nat_pico", published, backbone)
    for place, stage in enumerate((1, 2, 3)):
        assert converted[f"output_norms.{place}.weight"].unique().tolist() == [stage]
        assert converted[f"output_norms.{place}.bias"].unique().tolist() == [-stage]
    backbone.load_state_dict(converted)


def test_a_padded_image_gives_the_maps_of_one_padded_by_hand():
    backbone = VicinalBackbone("nat_pico", input_multiple=32).eval()
    x = torch.randn(1, 3, 50, 70)
    maps = backbone(x)
    padded = backbone(nn.functional.pad(x, [0, 96 - 70, 0, 64 - 50]))
    for found, expected in zip(maps, padded, strict=True):
        assert torch.equal(found, expected[:, :, : found.shape[2], : found.shape[3]])


def test_weights_without_the_counters_of_batch_norms_load(tmp_path):
    classifier = timm.create_model("shvit_pico_vicinal")
    state_dict = {key: value for key, value in classifier.state_dict().items() if "num_batches_tracked" not in key}
    assert len(state_dict) < len(classifier.state_dict())
    save(tmp_path / "weights.safetensors", state_dict)
    backbone = VicinalBackbone("shvit_pico_vicinal", pretrained=str(tmp_path / "weights.safetensors"))
    backbone.init_weights()
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, state_dict.get(key, torch.tensor(0))), key


@pytest.mark.parametrize("suffix", ["folder", ".safetensors", ".pth"])
def test_a_classifiers_weights_load_whole(suffix: str, tmp_path):
    classifier = timm.create_model("davit_pico_vicinal", num_classes=7).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == "folder":
        save_model(path, classifier)
    elif suffix == ".pth":
        torch.save({"model": classifier.state_dict()}, path)
    else:
        save(path, classifier.state_dict())
    backbone = VicinalBackbone("davit_pico_vicinal", pretrained=str(path)).eval()
    backbone.init_weights()
    image = torch.randn(1, 3, 64, 64)
    expected = classifier.forward_intermediates(image, intermediates_only=True)
    for x, y in zip(backbone(image), expected, strict=True):
        assert torch.equal(x, y)


def test_weights_that_do_not_fit_are_reported(tmp_path):
    state_dict = timm.create_model("nat_pico").state_dict()
    state_dict.pop("stem.conv1.weight")
    state_dict["stages.0.extra"] = torch.zeros(1)
    save(tmp_path / "weights.safetensors", state_dict)
    backbone = VicinalBackbone("nat_pico", pretrained=str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match=r"2 entries.*missing: stem.conv1.weight; left over: stages.0.extra"):
        backbone.init_weights()


OFFICIAL = {
    "nat/nat_mini": {f"norm{stage}": 64 * 2**stage for stage in range(4)},
    "dinat/dinat_mini": {f"norm{stage}": 64 * 2**stage for stage in range(4)},
    "transnext/transnext_micro": {},
    "davit/davit_tiny": {f"norm{stage}": 96 * 2**stage for stage in range(4)},
}


@pytest.mark.parametrize("variant", OFFICIAL)
def test_published_detectors_convert(variant: str):
    family, name = variant.split("/")
    golden = Golden(FOLDER / family / f"{name}.json")
    # the dense-task code of the three has neither classifier nor its norm, and a norm for each map
    official = {key: value for key, value in golden.state_dict().items() if not key.startswith(("head.", "norm."))}
    official = {key: value for key, value in official.items() if not key.startswith("norms.")}
    for norm, width in OFFICIAL[variant].items():
        official |= {f"{norm}.weight": torch.rand(width), f"{norm}.bias": torch.rand(width)}
    published = {f"backbone.{key}": value for key, value in official.items()}
    published["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    model = nn.Module()
    model.backbone = VicinalBackbone(golden.name, output_norm="layer" if OFFICIAL[variant] else None)
    converted = convert_detector(model, published)
    assert set(converted) == {*model.state_dict(), "neck.lateral_convs.0.conv.weight"}
    model.load_state_dict({key: value for key, value in converted.items() if key.startswith("backbone.")})
    for stage, norm in enumerate(OFFICIAL[variant]):
        assert torch.equal(model.backbone.output_norms[stage].weight, official[f"{norm}.weight"])
    # ours passes as it is
    assert set(convert_detector(model, converted)) == set(converted)


@pytest.mark.parametrize(
    ("options", "strides"),
    [
        ({"num_outs": 5, "num_finer": 2}, (4, 8, 16, 32, 64)),
        ({"num_outs": 5, "num_finer": 1, "extra_levels": "conv"}, (8, 16, 32, 64, 128)),
    ],
)
def test_the_extended_fpn_reaches_the_strides_of_detectors(options: dict, strides: tuple):
    neck = ExtendedFPN([8, 12, 16], 6, **options)
    neck.init_weights()
    maps = neck([torch.randn(1, 8, 16, 24), torch.randn(1, 12, 8, 12), torch.randn(1, 16, 4, 6)])
    assert [tuple(x.shape) for x in maps] == [(1, 6, -(-256 // s), -(-384 // s)) for s in strides]
    with pytest.raises(ValueError, match="num_outs=3"):
        ExtendedFPN([8, 12, 16], 6, num_outs=3, num_finer=1)


@pytest.mark.parametrize(("extra", "mmdets"), [("pool", False), ("conv", "on_input")])
def test_the_extended_fpn_without_finer_maps_is_mmdets(extra: str, mmdets):
    from mmdet.models.necks import FPN

    ours = ExtendedFPN([8, 12, 16], 6, num_outs=5, extra_levels=extra)
    theirs = FPN([8, 12, 16], 6, 5, add_extra_convs=mmdets)
    with torch.no_grad():
        for source, target in zip(ours.lateral_convs, theirs.lateral_convs, strict=True):
            target.conv.load_state_dict(source.state_dict())
        for source, target in zip((*ours.output_convs, *ours.coarser_convs), theirs.fpn_convs, strict=True):
            target.conv.load_state_dict(source.state_dict())
    # odd sizes: the path down must end at the size of the finer map
    maps = [torch.randn(2, 8, 15, 21), torch.randn(2, 12, 8, 11), torch.randn(2, 16, 4, 6)]
    for x, y in zip(ours(maps), theirs(maps), strict=True):
        torch.testing.assert_close(x, y)


def test_the_extended_fpn_goes_to_finer_maps_from_the_sum_of_the_coarser_ones():
    neck = ExtendedFPN([8, 12], 6, num_outs=4, num_finer=2)
    maps = [torch.randn(2, 8, 4, 6), torch.randn(2, 12, 2, 3)]
    lateral = [conv(x) for conv, x in zip(neck.lateral_convs, maps, strict=True)]
    summed = lateral[0] + lateral[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    finer = neck.finer_convs[0](summed)
    expected = [neck.finer_convs[1](finer), finer, summed, lateral[1]]
    for x, y, conv in zip(neck(maps), expected, neck.output_convs, strict=True):
        torch.testing.assert_close(x, conv(y))


def test_a_pyramid_is_made_from_maps_of_one_stride():
    maps = RescaledPyramid(6)([torch.randn(2, 6, 5, 7)] * 4)
    assert [tuple(x.shape[2:]) for x in maps] == [(20, 28), (10, 14), (5, 7), (3, 4)]
    with pytest.raises(ValueError, match="power of two"):
        RescaledPyramid(6, scales=(3, 1, 1, 1))


class Detector(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.backbone = VicinalBackbone("nat_pico", **options)
        self.head = nn.Linear(4, 4)


def optimizer_groups(model: nn.Module, **paramwise) -> dict[str, dict]:
    cfg = {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}}
    wrapper = BackboneOptimWrapperConstructor(cfg, paramwise)(model)
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(group["params"][0])]: group for group in wrapper.optimizer.param_groups}


def test_layer_decay_falls_from_the_head_to_the_stem():
    groups = optimizer_groups(Detector(), layer_decay=0.5)
    rate = {name: group["lr"] for name, group in groups.items()}
    prefix = "backbone.model."
    assert rate["head.weight"] == 1.0
    last = rate[f"{prefix}stages.3.blocks.0.norm1.weight"]
    third = [rate[f"{prefix}stages.2.blocks.{index}.norm1.weight"] for index in range(3)]
    assert last == 0.5
    # a downsampling step counts with the block that follows it, as in timm
    assert third[1] == 0.5 * third[2]
    assert third[0] == 0.5 * third[1]
    assert rate[f"{prefix}stem.conv1.weight"] == min(rate.values())
    assert rate[f"{prefix}stages.0.blocks.0.norm1.weight"] == 2 * rate[f"{prefix}stem.conv1.weight"]


def test_the_models_own_exemptions_from_decay_join_the_configs():
    keys = {"backbone": {"lr_mult": 0.1}}
    groups = optimizer_groups(Detector(), custom_keys=keys, model_no_decay=True)
    bias = groups["backbone.model.stages.0.blocks.0.attn.relative_position_bias"]
    assert (bias["lr"], bias["weight_decay"]) == (0.1, 0.0)
    assert groups["backbone.model.stages.0.blocks.0.norm1.weight"]["weight_decay"] == 0.0
    assert groups["backbone.model.stages.0.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    assert groups["head.bias"]["weight_decay"] == 0.1


def test_the_models_own_factors_of_the_learning_rate_hold():
    model = nn.Module()
    model.backbone = VicinalBackbone("litv2_pico")
    groups = optimizer_groups(model, model_no_decay=True)
    merging = "backbone.model.stages.1.downsample"
    assert groups[f"{merging}.offset.weight"]["lr"] == 0.01 * groups[f"{merging}.conv.weight"]["lr"]


def test_parameter_groups_refuse_another_backbone():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="need VicinalBackbone"):
        optimizer_groups(model, layer_decay=0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast_computes_in_its_dtype_and_steps_in_float32(dtype: str):
    model = nn.Linear(4, 1)
    wrapper = AutocastOptimWrapper(dtype=dtype, loss_scale=64.0, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    x = torch.ones(1, 4)
    with wrapper.optim_context(model):
        out = model(x)
    assert out.dtype == getattr(torch, dtype)
    wrapper.backward(out.float().sum())
    # float16 scales the loss against underflow, bfloat16 has no need to
    assert torch.equal(model.weight.grad, (64.0 if dtype == "float16" else 1.0) * x)
    wrapper.step()
    assert torch.equal(model.weight, before - 1)
    with pytest.raises(ValueError, match="float64"):
        AutocastOptimWrapper(dtype="float64", optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def test_boxes_keep_their_pixels_under_bfloat16():
    from vicinal.zoo.mmlab.roi import Float32RoIExtractor

    layer = {"type": "RoIAlign", "output_size": 1, "sampling_ratio": 1}
    extractor = Float32RoIExtractor(layer, out_channels=1, featmap_strides=[4])
    columns = torch.arange(400.0).expand(1, 1, 8, 400).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        centre = extractor((columns,), torch.tensor([[0, 1331.0, 4, 1335.0, 12]]))
    # the middle, column 1333, lies 1333 / 4 - 0.5 = 332.75 into the map, between columns that bfloat16 rounds by 1
    assert centre.dtype == torch.float32
    assert abs(centre.item() - 332.75) <= 1


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_detector_trains_under_autocast(precision: str):
    model, _ = build_small("detect", "shapes_mask_rcnn_nat_pico")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    wrapper = AutocastOptimWrapper(dtype=precision, loss_scale=512.0, optimizer=optimizer)
    seen: set[torch.dtype] = set()
    model.neck.register_forward_hook(lambda module, inputs, outputs: seen.update(x.dtype for x in outputs))
    before = model.backbone.model.stem.conv1.weight.detach().clone()
    losses = model.train().train_step(detection_batch(), wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())
    assert seen == {getattr(torch, precision)}
    assert not torch.equal(model.backbone.model.stem.conv1.weight, before)
