"""What every operator owes torch: the same questions for each of them. A new operator joins by an entry in CALLS."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnxruntime
import pytest
import torch
import torch._dynamo.testing
from operator_testing import random_inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vicinal.kernels import (
    aggregated_attention,
    backend,
    explain,
    gated_positional_attention,
    halo_attention,
    neighborhood_attention,
    neighborhood_attention_packed,
    routed_attention,
    window_attention,
    window_attention_packed,
)


@dataclass(frozen=True)
class Call:
    """An operator with options, and a map that its sizes may grow from in steps of `step`."""

    function: Callable[..., Tensor]
    options: dict[str, Any]
    operands: tuple[Any, ...]
    bias: tuple[int, ...]
    keys: int
    map: tuple[int, int] = (8, 8)
    step: int = 4
    heads: int = 2
    head_dim: int = field(default=8)

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.vicinal, self.function.__name__)

    @property
    def backward_operator(self) -> Any:
        return getattr(torch.ops.vicinal, f"{self.function.__name__}_backward")

    def inputs(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", batch: int = 2) -> list[Tensor]:
        """Query, key, value and a bias."""
        shape = (batch, *self.map, self.heads, self.head_dim)
        return [*random_inputs(shape, dtype, layout), torch.randn(self.heads, *self.bias, dtype=dtype)]

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(query, key, value, relative_position_bias=bias, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        """Arguments of the registered operator."""
        return (query, key, value, *self.operands, bias, None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        """needs_gradient of the backward operator."""
        return [query, key, value, bias]


@dataclass(frozen=True)
class PackedCall(Call):
    """Query, key and value in one tensor."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        packed = torch.stack([query, key, value], -3)
        return self.function(packed, relative_position_bias=bias, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (torch.stack([query, key, value], -3), *self.operands, bias, None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query or key or value, bias]


@dataclass(frozen=True)
class AggregatedCall(Call):
    """Pooled tokens without gradient; the bias is that of the neighbours."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        pooled = key.detach()[:, :2, :2].flatten(1, 2)
        return self.function(query, key, value, pooled, pooled, local_bias=bias, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        pooled = key.detach()[:, :2, :2].flatten(1, 2)
        return (query, key, value, pooled, pooled, *self.operands, bias, None, None, 1.0)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value, False, False, bias, False, False]


@dataclass(frozen=True)
class GatedCall(Call):
    """The scores of position and the gate come from the bias, so that they follow the size of the map."""

    def positional(self, query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        # positions from a running sum: sizes of a torch.fx proxy are no numbers
        position = query.new_ones(query.shape[1:3], dtype=torch.float32).flatten().cumsum(0) / 16
        offset = position[None, :] - position[:, None]
        return bias[:, 0, None, None] * offset + bias[:, 1, None, None] * offset.square(), bias[:, 2]

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        bias = query.new_zeros(query.shape[3], 3) if bias is None else bias
        return self.function(query, key, value, *self.positional(query, bias))

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        tokens = query.shape[1] * query.shape[2]
        scores, gate = torch.randn(self.heads, tokens, tokens), torch.randn(self.heads)
        needed = bias is not None and bias.requires_grad
        return (query, key, value, scores.requires_grad_(needed), gate.requires_grad_(needed), None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value, bias, bias]


@dataclass(frozen=True)
class HaloCall(Call):
    """The bias is one of the relative logits, the same for every query."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        logits = expand_over_queries(bias, query)
        return self.function(query, key, value, relative_height_logits=logits, **self.options)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (query, key, value, *self.operands, expand_over_queries(bias, query), None, False, None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value, bias, False]


def expand_over_queries(bias: Tensor | None, query: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(query.shape[0], query.shape[1], query.shape[2], -1, -1)


@dataclass(frozen=True)
class RoutedCall(Call):
    """A map is its regions and their tokens; each sees itself and its mirror image. The bias is added to the output."""

    def routes(self, query: Tensor) -> Tensor:
        # numbers of the regions from a running sum: sizes of a torch.fx proxy are no numbers
        number = query.new_ones(query.shape[:2], dtype=torch.int64).cumsum(1) - 1
        return torch.stack((number, number.flip([1])), -1)

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        output = self.function(query, key, value, self.routes(query))
        return output if bias is None else output + bias.to(output.dtype)

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple:
        return (query, key, value, self.routes(query), None)

    def flags(self, query: bool, key: bool, value: bool, bias: bool) -> list[bool]:
        return [query, key, value]


CALLS = {
    "window": Call(
        window_attention,
        {"window_size": 4, "shift": (1, 2)},
        ([4, 4], "block", [1, 2]),
        (7, 7),
        keys=16,
    ),
    "grid": Call(
        window_attention,
        {"window_size": (4, 2), "partition": "grid"},
        ([4, 2], "grid", [0]),
        (7, 3),
        keys=8,
    ),
    "neighborhood": Call(
        neighborhood_attention,
        {"kernel_size": 3, "dilation": (2, 1)},
        ([3], [1], [2, 1], [False]),
        (5, 5),
        keys=9,
    ),
    "packed window": PackedCall(
        window_attention_packed,
        {"window_size": 4, "shift": (1, 2)},
        ([4, 4], "block", [1, 2]),
        (7, 7),
        keys=16,
    ),
    "packed neighborhood": PackedCall(
        neighborhood_attention_packed,
        {"kernel_size": 3, "dilation": (2, 1)},
        ([3], [1], [2, 1], [False]),
        (5, 5),
        keys=9,
    ),
    "aggregated": AggregatedCall(aggregated_attention, {"window_size": 3}, (3,), (9,), keys=9 + 4),
    "gated": GatedCall(gated_positional_attention, {}, (), (3,), keys=64),
    "routed": RoutedCall(routed_attention, {}, (), (8,), keys=16),
    "halo": HaloCall(halo_attention, {"block_size": 4, "halo_size": 1}, (4, 1), (6,), keys=36),
}


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


def test_vmap_is_refused(call: Call) -> None:
    tensors = call.inputs()
    with pytest.raises(NotImplementedError, match="no vmap rule; fold the mapped axis into the batch axis"):
        torch.func.vmap(lambda query: call.run(query, *tensors[1:]))(torch.stack([tensors[0]] * 2))


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
