"""Networks under forward mode, torch.func and second derivatives: values against central differences and loops.

In float64, on one small image; every family answers through its debug-sized variants, and timm's networks with our
operators inside as well. A central difference of step 1e-6 is off by some 1e-8 after ten layers.
"""

import functools
from collections.abc import Callable

import pytest
import timm
import torch
from test_accelerate import CASES
from test_accelerate import create as create_timms
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torchvision.ops import deform_conv2d

from vicinal.kernels import backend
from vicinal.zoo import accelerate
from vicinal.zoo.blocks.deformable_formula import deformable_convolution
from vicinal.zoo.names import variants

STEP = 1e-6
ACCURACY = 1e-6
EXACT = 1e-9
"""Of the same network with sums in another order, some of whose attention is nearly one-hot."""
NAMES = variants("*_pico*")
NATIVE = dict.fromkeys(NAMES, 32) | {name: 64 for name in NAMES if name.startswith(("shvit", "convit"))}

names = pytest.mark.parametrize("name", NAMES)
# One of each operator that accelerate() puts in, and the blocks around it.
accelerated = pytest.mark.parametrize(
    "name", ["swin_padded", "maxvit_tf", "maxvit_nchw", "coatnet", "davit", "convit", "halonet"]
)


class Network:
    """A network with its classifier, every branch at work, as a function of an image and of its parameters."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        torch.manual_seed(1)
        self.model = model
        self.images = torch.randn(2, 3, *size, dtype=torch.float64)
        self.direction = torch.randn_like(self.images)
        self.parameters = {name: value.detach() for name, value in model.named_parameters()}
        self.turns = {name: torch.randn_like(value) * value.abs().mean() for name, value in self.parameters.items()}

    def loss(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self.model, parameters, (images,)).square().sum()

    def moved(self, step: float) -> tuple[dict[str, Tensor], Tensor]:
        parameters = {name: value + step * self.turns[name] for name, value in self.parameters.items()}
        return parameters, self.images + step * self.direction

    def gradients(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        leaves = [value.clone().requires_grad_() for value in (*parameters.values(), images)]
        named = dict(zip(parameters, leaves, strict=False))
        return flat(torch.autograd.grad(self.loss(named, leaves[-1]), leaves))

    def along(self, function: Callable[..., Tensor]) -> Tensor:
        """Central difference along all directions at once."""
        return (function(*self.moved(STEP)) - function(*self.moved(-STEP))) / (2 * STEP)

    def logits(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self.model, parameters, (images,))


@functools.cache
def ours(name: str) -> Network:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval().double()
    for key, parameter in model.named_parameters():
        # batch norms and layer scales that begin as zero would hide a branch; offsets of zero lie on a kink
        if not parameter.any() or key.endswith("gamma"):
            nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.1)
    return Network(model, (NATIVE[name], NATIVE[name]))


@functools.cache
def timms(name: str) -> Network:
    model = create_timms(CASES[name])
    accelerate(model)
    return Network(model, CASES[name].size)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_near(actual: Tensor, expected: Tensor, accuracy: float, of: Tensor | None = None) -> None:
    """Hold to a share of the largest element; besides, a difference of values `of` this size has their rounding."""
    assert actual.shape == expected.shape
    rounding = 0.0 if of is None else 8 * torch.finfo(torch.float64).eps * of.abs().max() / STEP
    assert (actual - expected).abs().max() <= accuracy * expected.abs().max() + rounding


def check_forward_mode(network: Network) -> None:
    point, direction = (network.parameters, network.images), (network.turns, network.direction)
    expected = network.along(network.logits)
    logits, tangent = jvp(network.logits, point, direction)
    assert_near(tangent, expected, ACCURACY, logits)
    with torch.no_grad(), forward_ad.dual_level():
        images = forward_ad.make_dual(network.images, network.direction)
        tangent = forward_ad.unpack_dual(network.model(images)).tangent
    ahead, behind = (network.model(network.images + step * network.direction) for step in (STEP, -STEP))
    assert_near(tangent, (ahead - behind) / (2 * STEP), ACCURACY, logits)


def check_reverse_mode(network: Network) -> None:
    expected = network.gradients(network.parameters, network.images)
    of_parameters, of_images = grad(network.loss, (0, 1))(network.parameters, network.images)
    assert_near(flat((*of_parameters.values(), of_images)), expected, EXACT)
    logits, pull = vjp(network.model, network.images)
    assert_near(pull(2 * logits)[0], of_images, EXACT)
    rows = jacrev(network.model)(network.images)  # (2, classes, 2, 3, H, W)
    assert_near(torch.einsum("bk,bkncyx->ncyx", 2 * logits, rows), of_images, EXACT)


def check_vmap(network: Network) -> None:
    logits = network.model(network.images)
    assert_near(vmap(lambda image: network.model(image[None])[0])(network.images), logits, EXACT)
    per_sample = vmap(grad(lambda parameters, image: network.loss(parameters, image[None])), (None, 0))
    mapped = per_sample(network.parameters, network.images)
    for place, image in enumerate(network.images):
        single = grad(network.loss)(network.parameters, image[None])
        rows = flat(tuple(value[place] for value in mapped.values()))
        assert_near(rows, flat(tuple(single.values())), EXACT)


def check_second_derivative(network: Network) -> None:
    leaves = [value.clone().requires_grad_() for value in (*network.parameters.values(), network.images)]
    named = dict(zip(network.parameters, leaves, strict=False))
    gradients = torch.autograd.grad(network.loss(named, leaves[-1]), leaves, create_graph=True)
    directions = (*network.turns.values(), network.direction)
    product = sum((gradient * along).sum() for gradient, along in zip(gradients, directions, strict=True))
    twice = flat(torch.autograd.grad(product, leaves, materialize_grads=True))
    assert_near(twice, network.along(network.gradients), 10 * ACCURACY)


@names
@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_forward_mode(name: str, backend_name: str):
    with backend(backend_name):
        check_forward_mode(ours(name))


@names
def test_first_order_reverse(name: str):
    check_reverse_mode(ours(name))


@names
@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_vmap_over_images_and_per_sample_gradients(name: str, backend_name: str):
    with backend(backend_name):
        check_vmap(ours(name))


@names
def test_second_derivative_under_reference(name: str):
    with backend("reference"):
        check_second_derivative(ours(name))


@names
def test_forward_over_reverse(name: str):
    network = ours(name)
    image = jvp(grad(lambda x: network.loss(network.parameters, x)), (network.images,), (network.direction,))[1]
    ahead, behind = (
        grad(lambda x: network.loss(network.parameters, x))(network.images + step * network.direction)
        for step in (STEP, -STEP)
    )
    assert_near(image, (ahead - behind) / (2 * STEP), 10 * ACCURACY)


@accelerated
def test_accelerated_networks(name: str):
    check_forward_mode(timms(name))
    check_reverse_mode(timms(name))
    check_vmap(timms(name))
    with backend("reference"):
        check_vmap(timms(name))
        check_second_derivative(timms(name))


@names
def test_maps_are_found_by_fx_and_by_hook(name: str):
    """timm's AttentionExtract as it comes, which asks for unfused attention."""
    set_fused_attn(False)
    try:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).eval()
    finally:
        set_fused_attn(True)
    side = NATIVE[name]
    images = torch.randn(2, 3, side, side + 16)
    with torch.no_grad():
        traced = AttentionExtract(model)(images)
        hooked = AttentionExtract(model, method="hook")(images)
    assert all(maps.sum(-1).allclose(torch.ones(())) for maps in traced.values())
    # each of the hook's maps is one of FX's, but for routed attention, which FX takes as one module
    routed = (
        {key for key in hooked if key.startswith(("stages.0", "stages.1", "stages.2"))} if "biformer" in name else ()
    )
    for key, weights in hooked.items():
        if key not in routed:
            assert any(maps.shape == weights.shape and maps.allclose(weights) for maps in traced.values()), key
    assert len(hooked) > len(routed)


def test_the_formula_of_deformable_convolution_is_torchvisions():
    torch.manual_seed(0)
    for stride, kernel in (((2, 2), (2, 2)), ((2, 1), (3, 2))):
        size = [(side - extent) // step + 1 for side, extent, step in zip((9, 8), kernel, stride, strict=True)]
        offset = 3 * torch.randn(2, 2 * kernel[0] * kernel[1], *size)  # some of them leave the map
        given = [torch.randn(2, 5, 9, 8), offset, torch.randn(4, 5, *kernel), torch.randn(4)]
        leaves = [tensor.double().requires_grad_() for tensor in given]
        actual, expected = deformable_convolution(*leaves, stride), deform_conv2d(*leaves, stride=stride)
        assert_near(actual, expected, 1e-13)
        weight = torch.randn_like(expected)
        pairs = (torch.autograd.grad(output, leaves, weight) for output in (actual, expected))
        for ours_, torchvisions in zip(*pairs, strict=True):
            assert_near(ours_, torchvisions, 1e-13)
