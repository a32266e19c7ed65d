"""What every operator owes torch: the same questions for each of them."""

import copy
import io
from typing import Any

import onnxruntime
import pytest
import torch
import torch._dynamo.testing
from operator_calls import CALLS, Call
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vicinal.kernels import backend, explain, halo_attention, neighborhood_attention, window_attention
from vicinal.kernels.dispatch import OPERATORS


class Mixer(nn.Module):
    """A token mixer as the model zoo writes one: packed projection, operator, projection."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.heads, self.head_dim = call, call.heads, call.head_dim
        self.qkv = nn.Linear(4, 3 * call.heads * call.head_dim)
        self.table = nn.Parameter(torch.randn(call.heads, *call.bias))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], x.shape[2], 3, self.heads, self.head_dim)
        query, key, value = qkv.unbind(3)
        return self.call.run(query, key, value, self.table).flatten(-2)


class ScriptedWindow(nn.Module):
    """TorchScript cannot read the public function; a module calls the operator instead."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 7, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.ops.vicinal.window_attention(tokens, tokens, tokens, [4], "block", [2], self.table)[0]
        return window_attention(tokens, tokens, tokens, 4, shift=2, relative_position_bias=self.table)


class ScriptedNeighborhood(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            operator = torch.ops.vicinal.neighborhood_attention
            return operator(tokens, tokens, tokens, [3], [1], [1], [False], self.table)[0]
        return neighborhood_attention(tokens, tokens, tokens, 3, relative_position_bias=self.table)


@pytest.fixture(params=CALLS.values(), ids=CALLS.keys())
def call(request: pytest.FixtureRequest) -> Call:
    return request.param


def test_every_operator_is_called() -> None:
    assert {call.function.__name__ for call in CALLS.values()} == set(OPERATORS)


def step_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all parameter gradients of one training step."""
    output = module(x)
    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return [output, *torch.autograd.grad(output, parameters, torch.randn(output.shape, generator=generator))]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compilers may fuse and reorder the float32 arithmetic around the operator: some hundred roundings, no more."""
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(call: Call, layout: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in call.inputs(layout=layout)]
    torch.library.opcheck(call.operator.default, call.arguments(*tensors))


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_opcheck_of_fake_results_in_other_dtypes(call: Call, dtype: torch.dtype, accumulation: torch.dtype) -> None:
    """The logsumexp has not the dtype of the query, nor has the gradient of a bias."""
    arguments = call.arguments(*call.inputs(dtype))
    torch.library.opcheck(call.operator.default, arguments, test_utils="test_faketensor")
    on_meta = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments]
    for output, logsumexp in (call.operator(*arguments), call.operator(*on_meta)):
        assert (output.dtype, logsumexp.dtype) == (dtype, accumulation)
        assert logsumexp.shape == output.shape[:-1]
    output, logsumexp = call.operator(*arguments)
    backward = (torch.ones_like(output), output, logsumexp, call.flags(True, True, True, True), *arguments)
    torch.library.opcheck(call.backward_operator.default, backward, test_utils="test_faketensor")


@pytest.mark.parametrize("needs_gradient", [[True] * 4, [False, True, False, True]], ids=["all", "some"])
def test_opcheck_backward(call: Call, needs_gradient: list[bool]) -> None:
    arguments = call.arguments(*call.inputs(layout="permuted"))
    output, logsumexp = call.operator(*arguments)
    grad_output, flags = torch.randn(1).expand(output.shape), call.flags(*needs_gradient)
    torch.library.opcheck(call.backward_operator.default, (grad_output, output, logsumexp, flags, *arguments))


@pytest.mark.parametrize("backend_name", ["reference", "tiled"])
def test_compile_with_changing_sizes(call: Call, backend_name: str) -> None:
    torch._dynamo.reset()
    mixer = Mixer(call)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=True)
    with backend(backend_name):
        for batch, grow in ((2, 0), (3, 1), (1, 2)):
            x = torch.randn(batch, *(size + grow * call.step for size in call.map), 4)
            assert_same(step_gradients(compiled, x), step_gradients(mixer, x))


def test_compile_once_for_all_sizes(call: Call) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Mixer(call), backend=counter, fullgraph=True, dynamic=True)
    for batch, grow in ((2, 0), (3, 1), (4, 2)):
        compiled(torch.randn(batch, *(size + grow * call.step for size in call.map), 4))
    assert counter.frame_count == 1


def test_compiled_code_follows_the_backend() -> None:
    torch._dynamo.reset()
    call = CALLS["window"]
    counter = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(Mixer(call), backend=counter, fullgraph=True)
    x = torch.randn(2, *call.map, 4)
    compiled(x)
    with backend("reference"):
        compiled(x)
    found = [any(node.target is call.operator for node in graph.graph.nodes) for graph in counter.graphs]
    assert found == [True, False]


def test_inductor() -> None:
    torch._dynamo.reset()
    mixer, x = Mixer(CALLS["window"]), torch.randn(2, 8, 8, 4)
    assert_same(step_gradients(torch.compile(mixer, fullgraph=True), x), step_gradients(mixer, x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(call: Call, use_reentrant: bool) -> None:
    mixer, x = Mixer(call), torch.randn(2, *call.map, 4, requires_grad=True)
    mixer(x).square().sum().backward()
    expected = mixer.table.grad.clone()
    mixer.zero_grad()
    torch.utils.checkpoint.checkpoint(mixer, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(mixer.table.grad, expected)


def dynamic_shapes(call: Call) -> tuple:
    """Any batch, and any map in steps; torch.export proves divisibility from the form of the dimension."""
    height, width = (call.step * torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    return ({0: torch.export.Dim("batch"), 1: height, 2: width},)


@pytest.mark.parametrize("strict", [True, False])
def test_export(call: Call, strict: bool) -> None:
    mixer = Mixer(call)
    x = torch.randn(2, *call.map, 4)
    program = torch.export.export(mixer, (x,), dynamic_shapes=dynamic_shapes(call), strict=strict)
    other = torch.randn(5, *(size + call.step for size in call.map), 4)
    assert_same([program.module()(other)], [mixer(other)])
    assert str(call.operator) in str([node.target for node in program.graph.nodes])


@pytest.mark.parametrize("backend_name", ["reference", "auto"])
def test_fx(call: Call, backend_name: str) -> None:
    mixer, x = Mixer(call), torch.randn(2, *call.map, 4)
    with backend(backend_name):
        traced = torch.fx.symbolic_trace(mixer)
    assert any(node.target is call.operator for node in traced.graph.nodes)
    assert_same(step_gradients(traced, x), step_gradients(mixer, x))
    assert_same([torch.jit.script(traced)(x)], [mixer(x)])


def test_jit_trace(call: Call) -> None:
    mixer, x = Mixer(call), torch.randn(2, *call.map, 4)
    other = torch.randn(3, *call.map, 4)
    assert_same([torch.jit.trace(mixer, x)(other)], [mixer(other)])


@pytest.mark.parametrize("module", [ScriptedWindow(), ScriptedNeighborhood()], ids=["window", "neighborhood"])
def test_torchscript(module: nn.Module) -> None:
    scripted = torch.jit.script(copy.deepcopy(module))
    saved = io.BytesIO()
    torch.jit.save(scripted, saved)
    saved.seek(0)
    x = torch.randn(2, 8, 8, 2, 8)
    assert_same(step_gradients(torch.jit.load(saved), x), step_gradients(module, x))


def test_onnx(call: Call, tmp_path: Any) -> None:
    mixer = Mixer(call).eval()
    path = tmp_path / "mixer.onnx"
    x = torch.randn(2, *call.map, 4)
    torch.onnx.export(mixer, (x,), path, dynamo=True, dynamic_shapes=dynamic_shapes(call), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for batch, grow in ((2, 0), (3, 2)):
        x = torch.randn(batch, *(size + grow * call.step for size in call.map), 4)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same([torch.from_numpy(output)], [mixer(x)])


def test_onnx_where_all_axes_have_one_size(tmp_path: Any) -> None:
    """Batch, rows and columns of windows, and heads: the exporter must not take one of them for another."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return window_attention(x, x, x, 2) + halo_attention(x, x, x, 2, 1)

    path, x = tmp_path / "both.onnx", torch.randn(2, 4, 4, 2, 8)
    torch.onnx.export(Both(), (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same([torch.from_numpy(output)], [Both()(x)])


@pytest.mark.parametrize("backend_name", ["reference", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(call: Call, backend_name: str, dtype: torch.dtype) -> None:
    tensors = [tensor.requires_grad_() for tensor in call.inputs()]
    with backend(backend_name), torch.autocast("cpu", dtype):
        output = call.run(*tensors)
    gradients = torch.autograd.grad(output.float().square().sum(), tensors)
    assert output.dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    # As if query, key and value alone had been cast by hand, and nothing inside ran in the autocast dtype.
    with backend(backend_name):
        cast = [tensor.to(dtype) for tensor in tensors[:3]]
        by_hand = call.run(*cast, tensors[3])
        expected = torch.autograd.grad(by_hand.float().square().sum(), tensors)
    assert torch.equal(output, by_hand)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_backward_inside_autocast(call: Call) -> None:
    tensors = [tensor.requires_grad_() for tensor in call.inputs()]
    output = call.run(*tensors)
    expected = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_autocast_leaves_float64(call: Call) -> None:
    tensors = call.inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert call.run(*tensors).dtype == torch.float64


def test_meta(call: Call) -> None:
    tensors = [tensor.to("meta").requires_grad_() for tensor in call.inputs(torch.bfloat16)]
    output = call.run(*tensors)
    assert (output.shape, output.dtype, output.device.type) == (tensors[0].shape, torch.bfloat16, "meta")
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), tensors)] == [x.shape for x in tensors]


@pytest.mark.parametrize("backend_name", ["reference", "tiled"])
def test_empty_batch(call: Call, backend_name: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in call.inputs(batch=0)]
    with backend(backend_name):
        output = call.run(*tensors)
        gradients = torch.autograd.grad(output.sum(), tensors)
    assert output.shape == tensors[0].shape
    assert torch.equal(gradients[3], torch.zeros_like(tensors[3]))


def test_outputs_are_contiguous(call: Call) -> None:
    arguments = call.arguments(*call.inputs(layout="permuted"))
    output, logsumexp = call.operator(*arguments)
    flags = call.flags(True, True, True, True)
    gradients = call.backward_operator(torch.ones_like(output), output, logsumexp, flags, *arguments)
    assert len(gradients) == sum(flags)
    assert all(tensor.is_contiguous() for tensor in (output, logsumexp, *gradients))


def test_inference_mode_and_frozen_inputs(call: Call) -> None:
    tensors = call.inputs()
    with torch.inference_mode():
        inference = call.run(*tensors)
    assert torch.equal(inference, call.run(*tensors))
    assert not call.run(*tensors).requires_grad


def test_second_derivative_is_refused(call: Call) -> None:
    tensors = [tensor.requires_grad_() for tensor in call.inputs(torch.float64)]
    (gradient,) = torch.autograd.grad(call.run(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend\('reference'\)"):
        torch.autograd.grad(gradient.sum(), tensors[1])
    with backend("reference"):
        (gradient,) = torch.autograd.grad(call.run(*tensors).sum(), tensors[0], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), tensors[1])[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_mode_gives_the_same_bits(call: Call, dtype: torch.dtype) -> None:
    tensors = [tensor.requires_grad_() for tensor in call.inputs(dtype)]
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(call.run(*tensors).square().sum(), tensors) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_flops(call: Call) -> None:
    """Two products of queries x keys x head_dim forward; five backward, one of which recomputes the scores."""
    tensors = [tensor.requires_grad_() for tensor in call.inputs()]
    product = 2 * tensors[0].numel() * call.keys
    with FlopCounterMode(display=False) as counter:
        output = call.run(*tensors)
        assert counter.get_total_flops() == 2 * product
        output.sum().backward()
    assert counter.get_total_flops() == 7 * product


def test_explain(call: Call) -> None:
    arguments = call.arguments(*call.inputs()[:3], None)
    text = explain(call.function, *arguments)
    assert text.splitlines()[0] == f"{call.function.__name__}: tiled"
    assert text.splitlines()[1].startswith("fused: ")
    assert explain(call.function.__name__, *arguments) == text


def test_offsets_beyond_32_bits(call: Call) -> None:
    """Sizes of more than 2**31 elements stay integers of 64 bits; meta tensors allocate nothing."""
    query = torch.empty(1 << 20, *call.map, 16, 32, device="meta")
    assert call.run(query, query, query, None).numel() > 1 << 31
