"""What every model promises beyond timm's own tests: any size, finite gradients, precision, the unfused path, errors.

Each family answers for itself through its debug-sized variants.
"""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models._features import FeatureGetterNet, FeatureListNet
from torch import Tensor, nn

from vicinal.zoo.blocks import AttentionModule, RoutedAttention
from vicinal.zoo.names import variants

NAMES = variants("*_pico*")
SMALLEST = [
    "nat_mini",
    "dinat_mini",
    "davit_tiny_vicinal",
    "maxvit_tiny",
    "biformer_tiny",
    "transnext_micro",
    "shvit_s1_vicinal",
    "litv2_small",
    "convit_tiny_vicinal",
    "halonet26t_vicinal",
    "halonet_h0_paper",
]
SIZES = [(224, 224), (320, 256), (233, 271), (512, 384)]
names = pytest.mark.parametrize("name", NAMES)


def create(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def map_size(name: str, side: int, stride: int) -> int:
    if name.startswith("litv2_"):
        return -(-side // 4) // (stride // 4)  # its merging leaves an odd last row out
    return -(-side // stride)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALLEST)])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [0, 1])
def test_any_size_trains_and_gives_a_pyramid_with_the_strides_that_it_states(name: str, size: tuple, batch: int):
    model = create(name)
    model(image(batch, 3, *size)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    backbone = create(name, features_only=True)
    with torch.no_grad():
        maps = backbone(image(batch, 3, *size))
    assert len(maps) == len(backbone.feature_info.channels())
    for feature, channels, stride in zip(
        maps, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (batch, channels, *(map_size(name, side, stride) for side in size))


# Order of the stages, reversed, and one twice; a negative index counts from the end.
@names
@pytest.mark.parametrize("indices", [(2, 0), (-1, 1), (0, -2, 0)], ids=str)
def test_maps_come_in_the_order_asked_for_with_their_metadata(name: str, indices: tuple[int, ...]):
    model, x = create(name), image(1, 3, 96, 96)
    count = len(model.stages)
    with torch.no_grad():
        every = model.forward_intermediates(x, intermediates_only=True)
        expected = [every[index % count] for index in indices]
        for early in (False, True):
            _, maps = model.forward_intermediates(x, indices=list(indices), stop_early=early)
            assert all(torch.equal(found, wanted) for found, wanted in zip(maps, expected, strict=True))
        backbone = create(name, features_only=True, out_indices=indices)
        backbone.model.load_state_dict(model.state_dict(), strict=False)
        maps = backbone(x)
    assert all(torch.equal(found, wanted) for found, wanted in zip(maps, expected, strict=True))
    assert backbone.feature_info.channels() == [found.shape[1] for found in maps]
    assert backbone.feature_info.reduction() == [model.feature_info[index]["reduction"] for index in indices]
    assert backbone.feature_info.module_name() == [f"stages.{index % count}" for index in indices]


@names
def test_a_scripted_feature_net_keeps_the_order(name: str):
    backbone, x = create(name, features_only=True, out_indices=(2, 0)), image(1, 3, 96, 96)
    with torch.no_grad():
        for found, expected in zip(torch.jit.script(backbone)(x), backbone(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@names
def test_timms_kinds_of_feature_nets_give_nchw_maps_or_are_refused(name: str):
    x = image(1, 3, 96, 160)
    options = {"features_only": True, "out_indices": (2, 0)}
    with torch.no_grad():
        expected = create(name, **options)(x)
        assert all(found.shape[3] > found.shape[2] for found in expected)
        for kind in ("getter", "list", FeatureGetterNet):
            maps = create(name, feature_cls=kind, **options)(x)
            assert all(torch.equal(found, wanted) for found, wanted in zip(maps, expected, strict=True))
        by_name = create(name, feature_cls="dict", **options)(x)
    assert list(by_name) == ["stages.2", "stages.0"]
    assert all(torch.equal(found, wanted) for found, wanted in zip(by_name.values(), expected, strict=True))
    for kind in ("hook", "fx", "nothing", FeatureListNet):
        with pytest.raises(ValueError, match=r"^feature_cls=.* must be 'getter' or 'list' .* or 'dict' .*$"):
            create(name, feature_cls=kind, **options)


def test_a_probe_has_no_maps_of_its_own():
    with pytest.raises(ValueError, match="attentive_probe has no maps of its own: ask its backbone"):
        timm.create_model("attentive_probe", backbone="nat_pico", features_only=True)


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast_stays_finite_and_learns(name: str, dtype: torch.dtype):
    model = create(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets = image(10, 3, 32, 32), torch.arange(10) % 5
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


@names
def test_without_fused_attention_the_numbers_are_the_same(name: str):
    fused = create(name)
    # timm's switch, as an application sets it
    set_fused_attn(False)
    try:
        unfused = create(name)
    finally:
        set_fused_attn(True)
    unfused.load_state_dict(fused.state_dict())
    with torch.no_grad():
        expected = fused(image(2, 3, 70, 51))
        # the same formula in another order of summation, in float32, over some ten layers
        assert (unfused(image(2, 3, 70, 51)) - expected).abs().max() <= 1e-5 * expected.abs().max()


@names
def test_batches_do_not_mix(name: str):
    model, images = create(name), image(3, 3, 64, 48)
    with torch.no_grad():
        batched = model(images)
        single = torch.cat([model(one[None]) for one in images])
    assert (batched - single).abs().max() <= 1e-4 * batched.std()


@names
def test_reinitialisation_is_the_construction(name: str):
    """init_weights after to_empty draws every weight from the distribution that the constructor uses."""
    built = create(name)
    emptied = timm.create_model(name, num_classes=5, device="meta").to_empty(device="cpu")
    emptied.init_weights()
    for (key, ours), theirs in zip(emptied.state_dict().items(), built.state_dict().values(), strict=True):
        if ours.dtype.is_floating_point and ours.numel() > 1000:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2), key
        elif ours.dtype.is_floating_point and theirs.unique().numel() == 1:
            assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ["nat_pico", "dinat_pico", "davit_pico_vicinal", "maxvit_pico", "transnext_pico"])
def test_attention_dropout_acts_in_training_alone(name: str):
    plain, dropping = create(name), create(name, attn_drop_rate=0.5)
    dropping.load_state_dict(plain.state_dict())
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(dropping(x), plain(x))
        dropping.train()
        assert not torch.equal(dropping(x), dropping(x))


@names
def test_attention_weights_are_those_that_hooks_see(name: str):
    set_fused_attn(False)
    try:
        model = create(name)
    finally:
        set_fused_attn(True)
    inputs, seen = {}, {}
    for key, module in model.named_modules():
        # the weights of routed attention lie on regions, see test_biformer.py
        if isinstance(module, AttentionModule) and not isinstance(module, RoutedAttention):
            drop = getattr(module, "attn_drop", None) or module.attn.attn_drop
            module.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]}))
            drop.register_forward_hook(lambda _, args, __, key=key: seen.update({key: args[0]}))
    with torch.no_grad():
        model(image(2, 3, 76, 92))
        assert inputs.keys() == seen.keys()
        assert inputs
        for key, x in inputs.items():
            weights, hooked = model.get_submodule(key).attention_weights(x), seen[key]
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            if hooked.ndim < 5:  # (batch, heads if there are several, queries, keys)
                hooked = hooked.unflatten(-2, weights.shape[1:3]).reshape(
                    len(x), -1, *weights.shape[1:3], hooked.shape[-1]
                )
                hooked = hooked.permute(0, 2, 3, 1, 4)
            torch.testing.assert_close(weights, hooked[:, : weights.shape[1], : weights.shape[2]])


def test_vit_with_relative_bias_takes_other_sizes_by_resizing_its_tables():
    options = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    at_64, at_96 = create("vitrpb_small", img_size=64, **options), create("vitrpb_small", img_size=96, **options)
    at_96.load_state_dict(at_96.adapt_state_dict(at_64.state_dict()))
    with torch.no_grad():
        assert at_64(image(1, 3, 96, 96)).shape == at_96(image(1, 3, 96, 96)).shape == (1, 5)
    assert at_96.stages[0].blocks[0].attn.relative_position_bias.shape == (2, 11, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (3, 2, 4, 8)}, "dim=32 is not a multiple of num_heads=3"),
        ({"num_heads": (1, 2)}, "depths has 4, num_heads has 2, dilations has 4"),
        ({"dilations": (1, 2, 1)}, "dilations has 3"),
        ({"kernel_size": 0}, "kernel_size"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create("nat_pico", **options)(image(1, 3, 32, 32))


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="windows"):
        create("nat_pico", windows=7)
