"""Neighborhood attention inside torch's machinery: tracing, compilation, export, autocast, meta tensors."""

import warnings

import pytest
import torch
from operator_testing import random_inputs, run_with_gradients
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vicinal.kernels import backend, explain
from vicinal.kernels.neighborhood import neighborhood_attention

OPERATOR = torch.ops.vicinal.neighborhood_attention
OPTIONS = {"kernel_size": (3, 5), "dilation": (2, 1), "stride": (1, 2), "is_causal": (True, False)}
SIZES = [(4, 11, 13), (3, 12, 14), (6, 7, 10)]  # of batch, height and width, each different from heads and head_dim


def inputs(batch: int = 2, height: int = 9, width: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Views of a packed projection, as models pass them, and a table of OPTIONS."""
    query, key, value = random_inputs((batch, height, width, 2, 8), dtype, "packed")
    table = torch.randn(2, 5, 9, dtype=torch.float64).to(dtype)
    return {"query": query, "key": key, "value": value, "relative_position_bias": table}


class Mixer(nn.Module):
    """A token mixer as a model would write it: attention on a packed projection of an NHWC map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.relative_position_bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).unbind(-3)
        if torch.jit.is_scripting():
            attended = torch.ops.vicinal.neighborhood_attention(
                query, key, value, [3], dilation=[2], relative_position_bias=self.relative_position_bias
            )[0]
        else:
            attended = neighborhood_attention(
                query, key, value, 3, dilation=2, relative_position_bias=self.relative_position_bias
            )
        return attended.flatten(-2)


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer()


def image(batch: int = 2, height: int = 9, width: int = 8) -> Tensor:
    return torch.randn(batch, height, width, 16, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("trained", [("query", "key", "value", "relative_position_bias"), ("query",), ()], ids=str)
def test_opcheck(trained: tuple[str, ...]) -> None:
    tensors = {name: tensor.requires_grad_(name in trained) for name, tensor in inputs().items()}
    torch.library.opcheck(OPERATOR.default, (*list(tensors.values())[:3], [3]), {"dilation": [2, 1]})
    options = {name: list(option) for name, option in OPTIONS.items()}
    torch.library.opcheck(OPERATOR.default, (), {**tensors, **options})


@pytest.mark.parametrize("layout", ["permuted", "sliced"])
def test_opcheck_of_other_layouts(layout: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in random_inputs((2, 6, 7, 2, 8), torch.float32, layout))
    torch.library.opcheck(OPERATOR.default, (query, key, value, [3]))


def test_opcheck_of_the_backward() -> None:
    tensors = inputs()
    arguments = (*list(tensors.values())[:3], [3, 5], [1], [1], [False], tensors["relative_position_bias"])
    output, logsumexp = OPERATOR(*arguments)
    for needed in ([True] * 4, [True, False, False, True]):
        torch.library.opcheck(
            torch.ops.vicinal.neighborhood_attention_backward.default,
            (torch.randn_like(output), output, logsumexp, needed, *arguments),
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_for_any_size(compiler: str) -> None:
    def attend(**tensors: Tensor) -> Tensor:
        return neighborhood_attention(**tensors, **OPTIONS).sin()

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=compiler, fullgraph=True, dynamic=True)
    for size in SIZES if compiler == "aot_eager" else SIZES[:2]:
        tensors = inputs(*size)
        expected = run_with_gradients(attend, tensors, tensors)
        with torch.compiler.set_stance("default" if size == SIZES[0] else "fail_on_recompile"):
            found = run_with_gradients(compiled, tensors, tensors)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name])


def test_compile_under_autocast(mixer: Mixer) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(image()), mixer(image()))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_for_any_size(mixer: Mixer, strict: bool) -> None:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    program = torch.export.export(mixer, (image(),), dynamic_shapes=(sizes,), strict=strict)
    assert "vicinal.neighborhood_attention" in str(program.graph)
    for size in SIZES:
        torch.testing.assert_close(program.module()(image(*size)), mixer(image(*size)))


def test_torchscript(mixer: Mixer) -> None:
    """A scripted module: outputs and gradients, as timm's tests ask of every model."""
    scripted = torch.jit.script(mixer)
    torch.testing.assert_close(scripted(image()), mixer(image()))
    parameters = list(mixer.parameters())
    found, expected = (torch.autograd.grad(module(image()).sum(), parameters) for module in (scripted, mixer))
    torch.testing.assert_close(found, expected)


def test_jit_trace(mixer: Mixer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(mixer, image(), check_trace=False)
    torch.testing.assert_close(traced(image(3, 10, 7)), mixer(image(3, 10, 7)))


def test_fx(mixer: Mixer) -> None:
    graph = torch.fx.symbolic_trace(mixer)
    assert any(node.target in (OPERATOR, OPERATOR.default, neighborhood_attention) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(image(3, 10, 7)), mixer(image(3, 10, 7)))


class GlobalMixer(nn.Module):
    """The kernel is the size of the map, whatever that is."""

    def forward(self, tokens: Tensor) -> Tensor:
        query = tokens.unflatten(-1, (2, 8))
        return neighborhood_attention(query, query, query, (tokens.shape[1], tokens.shape[2])).flatten(-2)


def test_symbolic_kernel_size() -> None:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    exported = torch.export.export(GlobalMixer(), (image(),), dynamic_shapes=(sizes,)).module()
    torch._dynamo.reset()
    compiled = torch.compile(GlobalMixer(), backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (torch.fx.symbolic_trace(GlobalMixer()), exported, compiled):
        for size in SIZES:
            tokens = image(*size).requires_grad_()
            found, expected = function(tokens), GlobalMixer()(tokens)
            torch.testing.assert_close(found, expected)
            grads = [torch.autograd.grad(output.square().sum(), tokens)[0] for output in (found, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("causal", [False, True])
def test_onnx_for_any_size(tmp_path, causal: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            options = {"stride": (1, 2), "dilation": (2, 1), "is_causal": (causal, False)}
            return neighborhood_attention(query, key, value, (3, 5), relative_position_bias=bias, **options)

    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    path = tmp_path / "attention.onnx"
    torch.onnx.export(
        Attention().eval(),
        tuple(inputs().values()),
        path,
        dynamo=True,
        dynamic_shapes=(dimensions, dimensions, dimensions, {}),
        input_names=["query", "key", "value", "bias"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        tensors = inputs(*size)
        feeds = dict(zip(["query", "key", "value", "bias"], (t.numpy() for t in tensors.values()), strict=True))
        expected = Attention()(*tensors.values())
        torch.testing.assert_close(torch.from_numpy(session.run(None, feeds)[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, name: str) -> None:
    """Computed in the autocast dtype; gradients come back in the dtype of the parameters."""
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in inputs().items()}
    with torch.autocast("cpu", dtype), backend(name):
        output = neighborhood_attention(**leaves, **OPTIONS)
    assert output.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(output.sum(), [*leaves.values()]))
    casted = [leaves[key].detach().to(dtype) for key in ("query", "key", "value")]
    with backend(name):
        bias = leaves["relative_position_bias"]
        assert torch.equal(output, neighborhood_attention(*casted, relative_position_bias=bias, **OPTIONS))


def test_meta() -> None:
    tensors = {name: tensor.to("meta") for name, tensor in inputs().items()}
    outcome = neighborhood_attention(**tensors, **OPTIONS)
    assert outcome.shape == (2, 9, 8, 2, 8)
    assert outcome.is_contiguous()


def test_no_second_derivative() -> None:
    query = inputs()["query"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(neighborhood_attention(query, query, query, 3).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend\('reference'\)"):
        gradient.sum().backward()


def test_no_vmap() -> None:
    tokens = torch.randn(3, 2, 6, 6, 2, 8)
    with pytest.raises(NotImplementedError, match="fold the mapped axis into the batch"):
        torch.func.vmap(lambda one: neighborhood_attention(one, one, one, 3))(tokens)


def test_inference_mode_then_training() -> None:
    """What is cached under inference mode must serve autograd afterwards."""
    query, key, value = random_inputs((1, 23, 25, 1, 4), torch.float32)
    with torch.inference_mode():
        expected = neighborhood_attention(query, key, value, 5)
    output = neighborhood_attention(query.requires_grad_(), key, value, 5)
    output.sum().backward()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(mixer: Mixer, use_reentrant: bool) -> None:
    tokens = image().requires_grad_()
    (expected,) = torch.autograd.grad(mixer(tokens).sum(), tokens)
    torch.utils.checkpoint.checkpoint(mixer, tokens, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(tokens.grad, expected)


def test_flops() -> None:
    """Two products of head_dim for each pair of query and key, twice that and the recomputed scores backwards."""
    query, key, value = (tensor.requires_grad_() for tensor in random_inputs((2, 9, 8, 2, 8), torch.float32))
    with FlopCounterMode(display=False) as forward:
        output = neighborhood_attention(query, key, value, (3, 5))
    assert forward.get_total_flops() == 2 * 2 * (2 * 9 * 8 * 2) * (3 * 5) * 8
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == forward.get_total_flops() * 5 // 2


def test_explain() -> None:
    tensors = inputs()
    said = explain("neighborhood_attention", *list(tensors.values())[:3], 3)
    assert said.startswith("neighborhood_attention: tiled")
    assert "fused:" in said


def test_fused_says_why_not() -> None:
    tensors = inputs()
    with backend("fused"), pytest.raises(ValueError, match="fused"):
        neighborhood_attention(**tensors, **OPTIONS)
