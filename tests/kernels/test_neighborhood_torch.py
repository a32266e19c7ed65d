"""Neighborhood attention in torch: what the questions of `test_contract.py`, put to every operator, leave open."""

import pytest
import torch
from operator_testing import random_inputs, run_with_gradients
from torch import Tensor, nn

from vicinal.kernels import neighborhood_attention

OPTIONS = {"kernel_size": (3, 5), "stride": (1, 2), "dilation": (2, 1), "is_causal": (True, False)}
SIZES = [(4, 11, 13), (3, 12, 14), (6, 7, 10)]  # of batch, height and width, each different from heads and head_dim


def inputs(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Views of a packed projection, and a table for OPTIONS."""
    query, key, value = random_inputs((batch, height, width, 2, 8), torch.float32, "packed")
    return {"query": query, "key": key, "value": value, "relative_position_bias": torch.randn(2, 5, 9)}


class GlobalMixer(nn.Module):
    """The kernel is the size of the map, whatever that is."""

    def forward(self, tokens: Tensor) -> Tensor:
        query = tokens.unflatten(-1, (2, 8))
        return neighborhood_attention(query, query, query, (tokens.shape[1], tokens.shape[2])).flatten(-2)


def test_opcheck_of_every_option() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(2, 9, 8).items()}
    options = {name: list(option) for name, option in OPTIONS.items()}
    torch.library.opcheck(torch.ops.vicinal.neighborhood_attention.default, (), {**tensors, **options})


@pytest.mark.parametrize("spatial", [(13,), (4, 5, 6)], ids=["1-D", "3-D"])
def test_opcheck_of_other_ranks(spatial: tuple[int, ...]) -> None:
    tensors = [tensor.requires_grad_() for tensor in random_inputs((2, *spatial, 2, 8), torch.float32, "sliced")]
    torch.library.opcheck(torch.ops.vicinal.neighborhood_attention.default, (*tensors, [3]))


def test_inductor_for_any_size() -> None:
    """One graph serves maps that the dilation divides and maps that it does not."""

    def attend(**tensors: Tensor) -> Tensor:
        return neighborhood_attention(**tensors, **OPTIONS).sin()

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for size in SIZES:
        tensors = inputs(*size)
        expected = run_with_gradients(attend, tensors, tensors)
        with torch.compiler.set_stance("default" if size == SIZES[0] else "fail_on_recompile"):
            found = run_with_gradients(compiled, tensors, tensors)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name])


def test_symbolic_kernel_size() -> None:
    def image(size: tuple[int, int, int]) -> Tensor:
        return torch.randn(*size, 16, requires_grad=True)

    mixer = GlobalMixer()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    exported = torch.export.export(mixer, (image(SIZES[0]),), dynamic_shapes=(sizes,)).module()
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (torch.fx.symbolic_trace(mixer), exported, compiled):
        for tokens in map(image, SIZES):
            outputs = function(tokens), mixer(tokens)
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), tokens) for out in outputs))


@pytest.mark.parametrize("causal", [False, True])
def test_onnx_with_every_option(tmp_path, causal: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = {**OPTIONS, "is_causal": (causal, False)}

    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, relative_position_bias: Tensor) -> Tensor:
            return neighborhood_attention(query, key, value, relative_position_bias=relative_position_bias, **options)

    names = list(inputs(*SIZES[0]))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    path = tmp_path / "attention.onnx"
    torch.onnx.export(
        Attention(),
        tuple(inputs(*SIZES[0]).values()),
        path,
        dynamo=True,
        dynamic_shapes=(axes, axes, axes, {}),
        input_names=names,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        tensors = inputs(*size)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        # Both are float32; the engines sum in different orders.
        torch.testing.assert_close(torch.from_numpy(found), Attention()(**tensors), rtol=1e-5, atol=1e-5)


def test_training_after_inference_mode() -> None:
    """What is cached under inference mode must serve autograd afterwards; no other test has this map."""
    query, key, value = random_inputs((1, 23, 26, 1, 4), torch.float32)
    with torch.inference_mode():
        expected = neighborhood_attention(query, key, value, 5, dilation=3)
    output = neighborhood_attention(query.requires_grad_(), key, value, 5, dilation=3)
    output.sum().backward()
    assert torch.equal(output, expected)
