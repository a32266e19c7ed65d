"""What only a GPU shows of the fused kernels: streams, graphs, compiled training steps, the choice of the backend."""

from collections.abc import Callable

import pytest
import timm
import torch
from operator_testing import seeded
from test_torch import OPERATORS, make
from torch import Tensor

import vicinal.zoo  # noqa: F401 (registers the models)
from vicinal.kernels import backend, explain, window_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is what is tested")


def step(call: Callable[[Tensor, Tensor], Tensor], packed: Tensor, other: Tensor) -> list[Tensor]:
    output = call(packed, other)
    return [output, *torch.autograd.grad(output.square().sum(), packed)]


def test_fused_is_chosen_by_itself() -> None:
    tokens = torch.zeros(1, 8, 8, 2, 16)
    assert explain(window_attention, tokens, tokens, tokens, 4) == "window_attention: fused"


@pytest.mark.parametrize("name", OPERATORS)
def test_graph_capture(name: str) -> None:
    """A captured forward and backward, replayed on other data, gives what runs outside the graph give."""
    call, packed, other = make(name)
    with backend("fused"):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step(call, packed, other)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(call, packed, other)
        with torch.no_grad():
            packed.copy_(torch.randn(packed.shape, generator=seeded(1)))
        graph.replay()
        expected = step(call, packed, other)
    for pair in zip(captured, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_other_streams(name: str) -> None:
    """Kernels start on the current stream: behind a long copy there, they see what it wrote."""
    call, packed, other = make(name)
    values = torch.randn(packed.shape, generator=seeded(2))
    with backend("fused"), torch.cuda.stream(torch.cuda.Stream()):
        torch.empty(1 << 28).fill_(1.0)
        late = values.clone().requires_grad_()
        actual = step(call, late, other)
    torch.cuda.synchronize()
    with backend("fused"):
        expected = step(call, values.clone().requires_grad_(), other)
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["nat_pico", "maxvit_pico", "transnext_pico", "biformer_pico", "halonet_pico"])
def test_compiled_training_step(name: str, request: pytest.FixtureRequest) -> None:
    """torch.compile(fullgraph) with inductor: the same loss and gradients, up to the order of its float32 sums."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(2, *model.default_cfg["input_size"])
    torch.set_default_device(None)  # torch 2.11 cannot trace through a default device
    request.addfinalizer(lambda: torch.set_default_device("cuda"))
    parameters = list(model.parameters())
    results = []
    for network in (model, torch.compile(model, fullgraph=True)):
        loss = network(images).square().sum()
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    largest = max(tensor.abs().max().item() for tensor in results[0])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5 * largest)
