"""HaloNet against timm's networks on the same weights, and what is particular to it: masks, a final convolution."""

import re

import pytest
import timm
import torch
from golden import Golden, list_golden
from timm.layers.bottleneck_attn import BottleneckAttn as TimmBottleneckAttention

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import convert
from vicinal.zoo.blocks.bottleneck import BottleneckAttention
from vicinal.zoo.blocks.halo import HaloAttention


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Millions of parameters that the paper states, of H0 to H7.
PAPER = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}


@pytest.mark.parametrize("golden", list_golden("halonet"), ids=repr)
def test_timms_weights_give_timms_logits(golden: Golden):
    state_dict = golden.state_dict()
    theirs = timm.create_model(golden.variant).eval()
    theirs.load_state_dict(state_dict)
    ours = timm.create_model(golden.name).eval()
    ours.load_state_dict(convert(golden.name, state_dict))
    batch = image(1, *timm.get_pretrained_cfg(golden.variant).input_size)
    with torch.no_grad():
        actual, expected = ours(batch), theirs(batch)
    # the rounding of the parity tests: float32 over some fifty layers, summed in another order
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


def test_initial_weights_follow_timms_rule():
    torch.manual_seed(0)
    ours = timm.create_model("halonet26t_vicinal")
    torch.manual_seed(0)
    theirs = timm.create_model("halonet26t")
    expected = convert("halonet26t_vicinal", theirs.state_dict())
    for key, value in ours.state_dict().items():
        if value.ndim < 2:
            assert torch.equal(value, expected[key]), key
        else:
            # deviations of two samples of n differ by their own deviation / sqrt(n); six of those
            assert value.std().item() == pytest.approx(expected[key].std().item(), rel=6 / value.numel() ** 0.5), key
    last = [value for key, value in ours.state_dict().items() if key.endswith("conv3_1x1.bn.weight")]
    assert last
    assert all(not value.any() for value in last)


def test_padding_is_masked_on_request():
    def create(**kwargs: object) -> torch.nn.Module:
        torch.manual_seed(0)
        model = timm.create_model("halonet_pico", num_classes=5, **kwargs)
        for name, parameter in model.named_parameters():
            if name.endswith("conv3_1x1.bn.weight"):
                torch.nn.init.ones_(parameter)
        return model.eval()

    masked = create(mask_padding=True)
    assert all(module.mask_padding for module in masked.modules() if isinstance(module, HaloAttention))
    with torch.no_grad():
        zeros, unmasked = masked(image(1, 3, 50, 70)), create()(image(1, 3, 50, 70))
    assert (zeros - unmasked).abs().max() > 1e-3 * unmasked.std()


def test_the_width_of_the_features_follows_the_final_convolution():
    model = timm.create_model("halonet_pico", num_classes=5).eval()
    batch = image(2, 3, 64, 64)
    assert model.forward_features(batch).shape[1] == model.num_features == 256
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert model.forward_features(batch).shape[1] == model.num_features == model.head_hidden_size == 192
    model.reset_classifier(7, "avg")
    assert model(batch).shape == (2, 7)


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_networks_have_the_papers_parameters(size: str):
    model = timm.create_model(f"halonet_{size}_paper", device="meta")
    # stated to a tenth of a million; the paper leaves batch norms and the position tables' form open
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1e6 * PAPER[size], rel=0.01)


@pytest.mark.parametrize("size", ["h0", "h5"])
def test_the_papers_networks_train_with_values_of_their_own_width(size: str):
    torch.manual_seed(0)
    model = timm.create_model(f"halonet_{size}_paper", num_classes=5)
    attention = [module for module in model.modules() if isinstance(module, HaloAttention)]
    widths = {
        round((module.kv.out_channels - module.q.out_channels) / module.q.out_channels, 3) for module in attention
    }
    assert widths == {{"h0": 1.0, "h5": 2.5}[size]}
    assert [module.num_heads for module in attention[:6]] == [4, 4, 4, 8, 8, 8]
    logits = model(image(2, 3, 50, 66))
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_papers_h1_is_timms_but_for_the_heads_of_the_first_stage():
    ours = timm.create_model("halonet_h1_paper", device="meta").state_dict()
    theirs = timm.create_model("halonet_h1_vicinal", device="meta").state_dict()
    differing = {key for key in ours if ours[key].shape != theirs[key].shape}
    tables = {f"{block}.self_attn.pos_embed.{axis}_rel" for block in range(3) for axis in ("height", "width")}
    assert list(ours) == list(theirs)
    assert differing == {f"stages.0.blocks.{table}" for table in tables}


@pytest.mark.parametrize(("stride", "dim_head"), [(1, None), (2, None), (1, 12)])
@pytest.mark.parametrize("fused", [True, False])
def test_bottleneck_attention_is_timms(stride: int, dim_head: int | None, fused: bool):
    torch.manual_seed(0)
    arguments = {"dim": 24, "dim_out": 32, "feat_size": (6, 10), "stride": stride, "num_heads": 4, "dim_head": dim_head}
    ours, theirs = BottleneckAttention(**arguments), TimmBottleneckAttention(**arguments)
    ours.load_state_dict(theirs.state_dict())
    ours.fused_attn = fused
    batch = image(2, 24, 6, 10).requires_grad_()
    inputs = [batch, *ours.parameters()]
    actual, expected = ours(batch), theirs(batch)
    # sums of some fifty products of order one: float32 rounds to 1e-7 of them, gradients add over two hundred tokens
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(actual.square().sum(), inputs)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected.square().sum(), [batch, *theirs.parameters()]), strict=True
    ):
        assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_bottleneck_attention_of_a_size_without_map_is_refused():
    with pytest.raises(ValueError, match=r"feat_size=\(0, 0\) must be at least 1 x 1; use a larger img_size"):
        timm.create_model("halo2botnet50ts_256_vicinal", img_size=16, device="meta")


def test_position_tables_belong_to_one_image_size_and_are_resized_to_others():
    golden = next(golden for golden in list_golden("halonet") if golden.variant == "halo2botnet50ts_256")
    state_dict = convert(golden.name, golden.state_dict())
    wide = timm.create_model(golden.name, num_classes=1000, img_size=(256, 512)).eval()
    wide.load_state_dict(wide.adapt_state_dict(state_dict))
    assert wide.state_dict()["stages.3.blocks.1.self_attn.pos_embed.width_rel"].shape == (31, 128)
    native = timm.create_model(golden.name).eval()
    native.load_state_dict(state_dict)
    theirs = timm.create_model("halo2botnet50ts_256", img_size=(256, 512)).eval()
    theirs.load_state_dict({re.sub(r"^(stages.\d).blocks", r"\1", key): x for key, x in wide.state_dict().items()})
    batch = image(1, 3, 256, 512)
    with torch.no_grad():
        expected = theirs(batch)
        for model in (wide, native):
            assert (model(batch) - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["halo2botnet50ts_256_vicinal", "lamhalobotnet50ts_256_vicinal"])
@pytest.mark.parametrize("size", [(64, 64), (233, 271), (320, 256)])
def test_hybrids_take_any_size(name: str, size: tuple[int, int]):
    model = timm.create_model(name, num_classes=5)
    logits, features = model(image(2, 3, *size)), model.forward_features(image(1, 3, *size))
    logits.square().sum().backward()
    assert features.shape[2:] == tuple(-(-side // 32) for side in size)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
