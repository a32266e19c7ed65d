"""ConViT: where it starts from, how its embeddings follow the image, and that it is timm's network."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import convert, save_model
from vicinal.zoo.blocks.gated import GatedPositionalAttention
from vicinal.zoo.convit import ConViT


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def create(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convit_pico_vicinal", **kwargs).eval()


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("side", [64, 96])
def test_logits_and_start_are_those_of_timm(pool: str, side: int):
    theirs = timm.create_model("convit_tiny", img_size=side, num_classes=5, global_pool=pool).eval()
    ours = timm.create_model("convit_tiny_vicinal", img_size=side, num_classes=5, global_pool=pool).eval()
    for block, stage in zip(theirs.blocks[:10], ours.stages[:10], strict=True):
        attn = stage.blocks[0].attn
        assert torch.equal(attn.pos_proj.weight, block.attn.pos_proj.weight)
        assert torch.equal(attn.v.weight, block.attn.v.weight)
        assert torch.equal(attn.gating_param, block.attn.gating_param)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        ours.load_state_dict(convert("convit_tiny_vicinal", theirs.state_dict(), img_size=side))
        expected = theirs(image(2, 3, side, side))
        # the same sums in another order, over twelve blocks
        assert (ours(image(2, 3, side, side)) - expected).abs().max() <= 1e-5 * expected.std()


def test_position_scores_are_the_linear_map_of_every_offset():
    attention = GatedPositionalAttention(4, 2, dtype=torch.float64)
    weight, bias = attention.pos_proj.weight, attention.pos_proj.bias
    scores = attention.position_scores(image(1, 2, 3, 4).double())
    positions = [(y, x) for y in range(2) for x in range(3)]
    for query, (y, x) in enumerate(positions):
        for key, (other_y, other_x) in enumerate(positions):
            dx, dy = other_x - x, other_y - y
            expected = weight @ torch.tensor([dx, dy, dx**2 + dy**2], dtype=torch.float64) + bias
            torch.testing.assert_close(scores[:, query, key], expected)


def test_a_head_of_the_start_attends_to_one_neighbour():
    """Nine heads, by position alone and sharply: the taps of a 3 x 3 convolution, column by column."""
    attention = GatedPositionalAttention(36, 9, locality_strength=20.0)
    attention.reset_parameters()
    attention.initialize_locality()
    nn.init.zeros_(attention.pos_proj.bias)
    nn.init.constant_(attention.gating_param, 30.0)
    weights = attention.attention_weights(image(1, 5, 5, 36))
    attended = weights[0, 2, 2].argmax(-1)  # of the middle query, by head
    assert weights[0, 2, 2].amax(-1).min() > 0.99
    assert attended.tolist() == [6, 11, 16, 7, 12, 17, 8, 13, 18]


def test_values_pass_unchanged_at_the_start_also_after_to_empty():
    empty = timm.create_model("convit_pico_vicinal", device="meta").to_empty(device="cpu")
    empty.init_weights()
    attention = empty.stages[0].blocks[0].attn
    assert torch.equal(attention.v.weight, torch.eye(128))
    assert attention.gating_param.eq(1).all()
    assert attention.pos_proj.weight[:, 2].eq(-1).all()


@torch.no_grad()
def test_embeddings_follow_rectangular_images():
    square = create()
    wide = create(img_size=(64, 96))
    assert wide.stem.pos_embed.shape == (1, 4, 6, 128)
    wide.load_state_dict(wide.adapt_state_dict(square.state_dict()))
    # resized once on loading, or in every forward pass: the same interpolation
    torch.testing.assert_close(square(image(1, 3, 64, 96)), wide(image(1, 3, 64, 96)))
    assert square(image(1, 3, 50, 90)).shape == (1, 1000)
    torch.testing.assert_close(square.stem.pos_embed[:, :1], square.state_dict()["stem.pos_embed"][:, :1])


@torch.no_grad()
def test_features_leave_the_class_token_out():
    model = create()
    features, maps = model.forward_intermediates(image(2, 3, 64, 96))
    assert features.shape == (2, 1 + 24, 128)
    assert [tuple(x.shape) for x in maps] == [(2, 128, 4, 6)] * 6
    tokens = model.stages(model.stem(image(2, 3, 64, 96)))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), tokens[:, 1:])


def test_attention_dropout_acts_in_training_alone():
    model = create(attn_drop_rate=0.5)
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_options_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="local_depth=6 must be at least 0 and less than depth=6"):
        create(local_depth=6)
    with pytest.raises(ValueError, match="dim=128 is not a multiple of num_heads=3"):
        create(num_heads=3)
    with pytest.raises(AssertionError, match="pool_type='mean' is not supported"):
        create(global_pool="mean")


def test_plain_attention_alone_is_a_vision_transformer():
    model = ConViT(img_size=32, embed_dim=32, depth=2, local_depth=0, num_heads=2, num_classes=3)
    assert model(image(2, 3, 32, 32)).shape == (2, 3)
    assert not any(isinstance(module, GatedPositionalAttention) for module in model.modules())


RECTANGLES = [((32, 128), 64), ((64, 144), 96), (64, (32, 128)), ((64, 96), (96, 64))]


def interpolate(embedding: Tensor, size: tuple[int, int]) -> Tensor:
    """Embeddings (1, height, width, dim) at another grid."""
    return F.interpolate(embedding.permute(0, 3, 1, 2), size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("before", "after"), RECTANGLES, ids=str)
@torch.no_grad()
def test_embeddings_of_a_rectangle_go_to_another_grid_by_both_their_sides(
    before: int | tuple[int, int], after: int | tuple[int, int], tmp_path: Path
):
    """2 x 8 tokens are as many as 4 x 4, and 4 x 9 as many as 6 x 6."""
    source, target = create(img_size=before), create(img_size=after)
    expected = interpolate(source.stem.pos_embed, target.stem.pos_embed.shape[1:3])
    assert torch.equal(target.adapt_state_dict(source.state_dict())["stem.pos_embed"], expected)
    save_model(tmp_path, source)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=after)
    assert torch.equal(again.stem.pos_embed, expected)
    with pytest.raises(ValueError, match=r"stem\.pos_embed is \(1, "):
        convert("convit_pico_vicinal", source.state_dict(), img_size=after)
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.pos_embed"):
        target.load_state_dict(source.state_dict())


def as_tokens(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as official and older files are: it does not say which grid the embeddings are of."""
    return {**model.state_dict(), "stem.pos_embed": model.stem.pos_embed.detach().flatten(1, 2)}


@torch.no_grad()
def test_a_file_without_a_grid_is_of_a_square_or_refused():
    square, wide, tall = create(), create(img_size=(64, 96)), create(img_size=(32, 128))
    assert torch.equal(square.adapt_state_dict(as_tokens(square))["stem.pos_embed"], square.stem.pos_embed)
    resized = wide.adapt_state_dict(as_tokens(square))["stem.pos_embed"]
    assert torch.equal(resized, interpolate(square.stem.pos_embed, (4, 6)))
    # no square has 24 tokens: those of the network's own grid, or of one that nobody knows
    assert torch.equal(wide.adapt_state_dict(as_tokens(wide))["stem.pos_embed"], wide.stem.pos_embed)
    with pytest.raises(ValueError, match="has 24 tokens and does not say of which grid, and this network has 4 x 4"):
        square.adapt_state_dict(as_tokens(wide))
    # 16 tokens may be 4 x 4, or 2 x 8 as the network has them
    with pytest.raises(ValueError, match="has 16 tokens and does not say of which grid, and this network has 2 x 8"):
        tall.adapt_state_dict(as_tokens(square))


@torch.no_grad()
def test_the_config_says_the_grid_of_an_older_file(tmp_path: Path):
    tall = create(img_size=(32, 128))
    save_model(tmp_path, tall, as_tokens(tall))
    for size, grid in (((32, 128), (2, 8)), (64, (4, 4))):
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size)
        expected = tall.stem.pos_embed if grid == (2, 8) else interpolate(tall.stem.pos_embed, grid)
        assert torch.equal(again.stem.pos_embed, expected)


def test_timms_rectangles_convert_where_their_grid_is_certain():
    theirs = timm.create_model("convit_tiny", img_size=(64, 96))
    converted = convert("convit_tiny_vicinal", theirs.state_dict(), img_size=(64, 96))
    assert torch.equal(converted["stem.pos_embed"], theirs.pos_embed.unflatten(1, (4, 6)))
    ambiguous = timm.create_model("convit_tiny", img_size=(32, 128))
    with pytest.raises(ValueError, match=r"stem\.pos_embed is \(1, 16, 192\), expected \(1, 2, 8, 192\)"):
        convert("convit_tiny_vicinal", ambiguous.state_dict(), img_size=(32, 128))
