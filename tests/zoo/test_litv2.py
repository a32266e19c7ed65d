"""LITv2: how heads are shared out, what each kind attends to, and where deformable merging samples."""

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from vicinal.zoo.blocks.deformable import deform_conv2d
from vicinal.zoo.blocks.hilo import HiLoAttention
from vicinal.zoo.litv2 import DeformableMerging

EPSILON = torch.finfo(torch.float32).eps


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def merge_plainly(merging: DeformableMerging, x: Tensor) -> Tensor:
    """The merging with the samples on the grid."""
    convolved = F.conv2d(x.permute(0, 3, 1, 2), merging.conv.weight, merging.conv.bias, stride=2)
    return F.gelu(merging.norm(convolved)).permute(0, 2, 3, 1)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head, (tokens, channels) each, in float64."""
    scores = query.double() @ key.double().T * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize(
    ("alpha", "window_size", "low_heads"), [(0.9, 2, 10), (0.5, 2, 6), (0.0, 2, 0), (1.0, 4, 12), (0.0, 1, 12)]
)
def test_the_share_of_low_frequency_heads_is_rounded_down(alpha: float, window_size: int, low_heads: int):
    attention = HiLoAttention(24, 12, window_size, alpha)
    assert (attention.low.num_heads if attention.low else 0) == low_heads
    assert (attention.high.num_heads if attention.high else 0) == 12 - low_heads
    assert attention(tokens(1, 5, 7, 24)).shape == (1, 5, 7, 24)


@torch.no_grad()
def test_hilo_is_windows_beside_averages_on_the_padded_map():
    attention = HiLoAttention(8, 4, window_size=2, alpha=0.5)
    x = tokens(1, 3, 5, 8)
    padded = F.pad(x, [0, 0, 0, 1, 0, 1])[0]  # (4, 6, 8)
    expected = torch.empty(4, 6, 8, dtype=torch.float64)
    query, key, value = attention.high.qkv(padded).reshape(4, 6, 3, 2, 2).unbind(2)
    for head in range(2):
        for y in range(0, 4, 2):
            for column in range(0, 6, 2):
                window = [part[y : y + 2, column : column + 2, head].reshape(4, 2) for part in (query, key, value)]
                attended = plain_attention(*window).reshape(2, 2, 2)
                expected[y : y + 2, column : column + 2, 2 * head : 2 * head + 2] = attended
    means = padded.reshape(2, 2, 3, 2, 8).mean((1, 3)).reshape(6, 8)
    low_query = attention.low.q(padded).reshape(24, 2, 2)
    low_key, low_value = attention.low.kv(means).reshape(6, 2, 2, 2).unbind(1)
    for head in range(2):
        attended = plain_attention(low_query[:, head], low_key[:, head], low_value[:, head])
        expected[..., 4 + 2 * head : 6 + 2 * head] = attended.reshape(4, 6, 2)
    parts = (attention.high.proj(expected[..., :4].float()), attention.low.proj(expected[..., 4:].float()))
    expected = torch.cat(parts, -1)[:3, :5]
    # two projections and an attention in float32, sums of at most eight products of size about one
    assert (attention(x)[0] - expected).abs().max() <= 64 * EPSILON


def test_options_out_of_range_are_refused_by_name():
    with pytest.raises(ValueError, match=r"alpha=1\.5 must be a share"):
        HiLoAttention(8, 4, 2, alpha=1.5)
    with pytest.raises(ValueError, match="dim=8 is not a multiple of num_heads=3"):
        HiLoAttention(8, 3, 2, alpha=0.5)
    with pytest.raises(ValueError, match="window_sizes has 2"):
        timm.create_model("litv2_pico", window_sizes=(2, 1))


@pytest.mark.parametrize("size", [(6, 8), (7, 5)], ids=str)
@torch.no_grad()
def test_merging_begins_as_a_plain_convolution(size: tuple[int, int]):
    merging = DeformableMerging(4, 8).eval()
    x = tokens(2, *size, 4)
    expected = merge_plainly(merging, x)
    # sums of sixteen products in another order
    torch.testing.assert_close(merging(x), expected, rtol=0, atol=16 * EPSILON)
    assert expected.shape[1:3] == (size[0] // 2, size[1] // 2)


@torch.no_grad()
def test_an_offset_moves_the_samples_and_finds_zeros_outside():
    merging = DeformableMerging(4, 8).eval()
    merging.offset.bias.copy_(torch.tensor([0.0, 1.0] * 4))  # every tap one column to the right
    x = tokens(1, 4, 6, 4)
    moved = F.pad(x, [0, 0, 0, 1])[:, :, 1:]
    expected = merge_plainly(merging, moved)
    torch.testing.assert_close(merging(x), expected, rtol=0, atol=16 * EPSILON)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_an_offset_that_is_no_number_is_no_address(number: float):
    """It makes its own output NaN, in all channels, and leaves the others and what they are made of."""
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (6, 4, 2, 2), (2, 8, 4, 4))
    )
    bad = offset.clone()
    bad[1, 5, 2, 3] = number
    outputs, gradients = [], []
    for shift in (offset, bad):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, shift, weight)]
        outputs.append(deform_conv2d(*leaves, stride=(2, 2)))
        gradients.append(torch.autograd.grad(outputs[-1].nan_to_num().sum(), leaves))
    lost = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    lost[1, 0, 2, 3] = True
    assert torch.equal(outputs[1].isnan(), lost.expand_as(outputs[1]))
    clean, found = (output.masked_select(~lost) for output in outputs)
    assert torch.equal(clean, found)
    elsewhere = torch.arange(32).view(2, 4, 4) != 16 + 2 * 4 + 3
    assert torch.equal(gradients[0][1].movedim(1, -1)[elsewhere], gradients[1][1].movedim(1, -1)[elsewhere])
    assert torch.equal(gradients[0][0][0], gradients[1][0][0])


@pytest.mark.parametrize("distance", [1e3, 1e30, -3e38])
def test_an_offset_far_beyond_the_map_finds_zeros(distance: float):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(6, 4, 2, 2, generator=generator)
    offset = torch.zeros(1, 8, 4, 4)
    offset[0, :2, 1, 2] = distance  # the first tap of one output
    offset.requires_grad_()
    output = deform_conv2d(x, offset, weight, stride=(2, 2))
    expected = F.conv2d(x, weight, stride=2)
    expected[0, :, 1, 2] -= weight[:, :, 0, 0] @ x[0, :, 2, 4]
    torch.testing.assert_close(output.detach(), expected, rtol=0, atol=16 * EPSILON)
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    assert gradient.isfinite().all()
    assert not gradient[0, :2, 1, 2].any()


@pytest.mark.parametrize(
    ("form", "number"),
    [
        ("eager", float("nan")),
        ("eager", float("inf")),
        *((x, float("nan")) for x in ("scripted", "traced", "exported")),
    ],
)
def test_an_image_with_a_bad_pixel_ruins_its_own_logits_only(form: str, number: float):
    torch.manual_seed(0)
    model = timm.create_model("litv2_pico", num_classes=5).eval()
    for stage in model.stages[1:]:
        torch.nn.init.normal_(stage.downsample.offset.weight)
    images = tokens(2, 3, 32, 32)
    with torch.no_grad():
        clean = model(images)
        run = {
            "eager": lambda: model,
            "scripted": lambda: torch.jit.script(model),
            "traced": lambda: torch.jit.trace(model, images),
            "exported": lambda: torch.export.export(model, (images,)).module(),
        }[form]()
        images[1, 0, 3, 5] = number
        logits = run(images)
    assert logits[1].isnan().all()
    torch.testing.assert_close(logits[0], clean[0], rtol=0, atol=1e-5)


def test_a_bad_pixel_ruins_the_gradient_of_its_image_only():
    torch.manual_seed(0)
    model = timm.create_model("litv2_pico", num_classes=5).eval()
    images = tokens(2, 3, 32, 32)
    images[1, 0, 3, 5] = float("nan")
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert gradient[0].isfinite().all()
    assert not gradient[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merging_keeps_the_dtype(dtype: torch.dtype):
    merging = DeformableMerging(4, 8).to(dtype).eval()
    x = tokens(1, 4, 4, 4).to(dtype).requires_grad_()
    output = merging(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == merging.offset.weight.grad.dtype == dtype


def test_offsets_begin_as_zero_also_after_to_empty():
    empty = timm.create_model("litv2_pico", device="meta").to_empty(device="cpu")
    empty.init_weights()
    for model in (empty, timm.create_model("litv2_pico")):
        offset = model.stages[1].downsample.offset
        assert not offset.weight.any()
        assert not offset.bias.any()


def test_window_sizes_choose_the_kind_of_every_stage():
    model = timm.create_model("litv2_pico", window_sizes=(4, 0, 1, 2), alpha=0.5, num_heads=(2, 2, 4, 8))
    mixers = [stage.blocks[0].attn for stage in model.stages]
    assert [mixer is not None and mixer.high is not None for mixer in mixers] == [True, False, False, True]
    assert mixers[1] is None
    assert model.eval()(tokens(1, 3, 50, 41)).shape == (1, 1000)
