"""BiFormer: what is routed where, both published forms, padding, and the refusals."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vicinal.zoo  # noqa: F401
from vicinal.zoo.blocks.attention import GlobalAttention
from vicinal.zoo.blocks.routed import (
    ProjectedRoutedAttention,
    RoutedAttention,
    choose_routes,
    flatten_map,
    unflatten_map,
)

FORMS = pytest.mark.parametrize("form", [RoutedAttention, ProjectedRoutedAttention])


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def double(module: nn.Module) -> nn.Module:
    return module.double().eval()


def plain_routing(
    attention: RoutedAttention, query: Tensor, key: Tensor, value: Tensor, means: list[Tensor], region: tuple[int, int]
) -> Tensor:
    """Routed attention of maps (H, W, dim) that regions divide, region by region.

    Args:
        means: averages (rows, columns, dim) of the queries and of the keys.
        region: height and width of the regions.
    """
    rows, columns = means[0].shape[:2]
    affinity = means[0].flatten(0, 1) @ means[1].flatten(0, 1).T
    best = affinity.argsort(dim=1, descending=True)[:, : attention.topk]
    output = torch.empty_like(value)
    cut = [
        (slice(r * region[0], (r + 1) * region[0]), slice(c * region[1], (c + 1) * region[1]))
        for r in range(rows)
        for c in range(columns)
    ]
    for place, chosen in zip(cut, best.tolist(), strict=True):
        keys, values = (torch.cat([x[cut[other]].flatten(0, 1) for other in chosen]) for x in (key, value))
        queries = query[place].flatten(0, 1)
        heads = (x.unflatten(1, [attention.num_heads, -1]).transpose(0, 1) for x in (queries, keys, values))
        attended = F.scaled_dot_product_attention(*heads, scale=query.shape[-1] ** -0.5)
        output[place] = attended.transpose(0, 1).reshape(output[place].shape)
    return output


@pytest.mark.parametrize("size", [(9, 12), (8, 10), (2, 5)], ids=str)
@torch.no_grad()
def test_padded_tokens_are_projected_and_routed_like_others(size: tuple[int, int]):
    attention = double(RoutedAttention(8, 2, grid=3, topk=2))
    x = tokens(1, *size, 8)
    region = [-(-side // 3) for side in size]
    padded = F.pad(x, [0, 0, 0, 3 * region[1] - size[1], 0, 3 * region[0] - size[0]])
    query, key, value = attention.qkv(padded)[0].chunk(3, dim=-1)
    means = [F.avg_pool2d(x.permute(2, 0, 1), region).permute(1, 2, 0) for x in (query, key)]
    attended = plain_routing(attention, query, key, value, means, tuple(region))
    attended = attended + attention.lepe(value.permute(2, 0, 1)).permute(1, 2, 0)
    expected = attention.proj(attended)[: size[0], : size[1]]
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(9, 12), (8, 10), (11, 13), (2, 5)], ids=str)
@torch.no_grad()
def test_the_refactored_form_pads_what_is_projected(size: tuple[int, int]):
    attention = double(ProjectedRoutedAttention(8, 2, grid=3, topk=2))
    x = tokens(1, *size, 8)
    region = [max(1, side // 3) for side in size]
    query, key, value = attention.qkv(x)[0].chunk(3, dim=-1)
    means = [
        F.avg_pool2d(part.permute(2, 0, 1), region, ceil_mode=True, count_include_pad=False).permute(1, 2, 0)
        for part in (query, key)
    ]
    bottom, right = (-side % part for side, part in zip(size, region, strict=True))
    padded = [F.pad(part, [0, 0, 0, right, 0, bottom]) for part in (query, key, value)]
    attended = plain_routing(attention, *padded, means, tuple(region))[: size[0], : size[1]]
    attended = attended + attention.lepe(value.permute(2, 0, 1)).permute(1, 2, 0)
    torch.testing.assert_close(attention(x)[0], attention.proj(attended), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_both_forms_agree_where_nothing_is_padded():
    first, second = (double(form(8, 2, grid=(2, 3), topk=3)) for form in (RoutedAttention, ProjectedRoutedAttention))
    second.load_state_dict(first.state_dict())
    x = tokens(2, 6, 12, 8)
    torch.testing.assert_close(first(x), second(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoding", ["input", "values"])
@torch.no_grad()
def test_the_last_stage_is_enhanced_by_its_inputs_or_its_values(encoding: str):
    attention = double(GlobalAttention(16, 8, local_encoding=encoding, qkv_bias=False))
    x = tokens(1, 5, 6, 16)
    query, key, value = (
        part.flatten(1, 2).unflatten(2, [8, 2]).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1)
    )
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
    source = attention.qkv(x)[..., 32:] if encoding == "values" else x
    expected = attention.proj(attended + attention.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)


def test_a_map_divided_in_place_and_back():
    x = tokens(2, 6, 10, 3, 4)
    regions = unflatten_map(x, [3, 2])
    assert torch.equal(regions[:, 1, :, 1], x[:, 2:4, 5:])
    assert regions.data_ptr() == x.data_ptr()
    assert torch.equal(flatten_map(regions, [6, 10]), x)


@FORMS
def test_attention_maps_lie_on_the_map(form: type[RoutedAttention]):
    """The weights of a query, on all tokens of the map, weigh the values as the operator does."""
    attention = double(form(8, 2, grid=3, topk=4))
    x = tokens(2, 6, 9, 8)
    value = attention.project(x)[:, :, :, 2]
    weights = attention.attention_weights(x)
    assert weights.shape == (2, 6, 9, 2, 54)
    assert ((weights > 0).sum(-1) == 4 * 6).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(attention.aggregate(weights, value), attention.attend_packed(attention.project(x)))


def test_padding_has_the_rest_of_the_attention():
    attention = double(RoutedAttention(8, 2, grid=3, topk=9))
    weights = attention.weights(*attention.project(attention.pad(tokens(1, 7, 9, 8))).unbind(3)[:2])
    assert weights.shape == (1, 9, 9, 2, 81)
    refactored = double(ProjectedRoutedAttention(8, 2, grid=3, topk=4))
    sums = refactored.attention_weights(tokens(1, 7, 9, 8)).sum(-1)  # regions of 2 x 3, one row of padding
    assert (sums <= 1 + 1e-12).all()
    assert (sums < 0.99).any()


@FORMS
def test_no_gradient_flows_through_the_choice(form: type[RoutedAttention]):
    """A far away region that is not chosen has no part in the gradient."""
    attention = double(form(8, 2, grid=2, topk=1))
    packed = tokens(1, 4, 4, 3, 2, 4).requires_grad_()
    routes = attention.route(packed)
    assert not routes.requires_grad
    attention.attend_packed(packed).square().sum().backward()
    chosen = torch.zeros(4, dtype=torch.bool)
    chosen[routes.flatten()] = True
    touched = attention.divide(packed.grad[:, :, :, 1]).abs().sum((2, 4, 5, 6)).flatten() > 0
    assert torch.equal(touched, chosen)


def test_the_grid_is_an_option():
    """As the official detectors have it: another grid with the same weights."""
    at_2, at_3 = (timm.create_model("biformer_pico", grid=grid).eval() for grid in (2, (3, 2)))
    at_3.load_state_dict(at_2.state_dict())
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert at_2(image).shape == at_3(image).shape
        assert not torch.equal(at_2(image), at_3(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topks": (1, 5, 4, None)}, r"topk=5 must be from 1 to the 4 regions of grid=2"),
        ({"topks": (0, 2, 4, None)}, r"topk=0 must be from 1"),
        ({"grid": 0}, "grid=0 must be one positive number"),
        ({"topks": (1, 2, 4)}, "topks has 3"),
        ({"head_dim": 24}, "head_dim=24 must divide every width"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        timm.create_model("biformer_pico", **options)


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
@torch.no_grad()
def test_an_image_with_a_bad_pixel_ruins_its_own_logits_only(number: float):
    """Routes are chosen by scores that are NaN there, and stay routes."""
    torch.manual_seed(0)
    model = timm.create_model("biformer_pico", num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    clean = model(images)
    images[1, 0, 3, 5] = number
    logits = model(images)
    assert logits[1].isnan().all()
    torch.testing.assert_close(logits[0], clean[0], rtol=0, atol=1e-5)


def test_routes_of_scores_that_are_no_numbers_are_regions():
    query, key = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = choose_routes(query, key, 3)
    query[0, 2] = float("nan")
    routes = choose_routes(query, key, 3)
    assert torch.equal(routes[0, [0, 1, 3, 4, 5]], expected[0, [0, 1, 3, 4, 5]])
    for bad in (float("nan"), float("inf"), -float("inf")):
        key[0, 1] = bad
        routes = choose_routes(query, key, 3)
        assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in routes[0].tolist())
