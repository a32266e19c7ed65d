"""Feed-forward networks of channels-last maps."""

import math
from typing import Any, Optional

import torch
from timm import layers
from torch import Tensor, nn
from torch.nn import functional as F

from .activation import GELU, GELUTanh, gelu

HIDDEN_IN_CACHE = 1 << 17
"""Hidden numbers that are computed together on a CPU: 512 KB, so that the steps between the products stay in cache."""
LARGE_HIDDEN = 1 << 22
"""Hidden numbers from which on that pays: memory of that size (16 MB) is taken from the system anew for each tensor."""


class Mlp(layers.Mlp):
    """timm's MLP. In training on a CPU a large hidden map is never stored behind the activation, nor is its gradient.

    Hooks on the layers inside, parametrized or replaced ones and lower precision have it computed layer by layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles the other side of an "and")
            if self._is_streamed(x):
                approximate = "tanh" if isinstance(self.act, GELUTanh) else "none"
                weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
                return _StreamedMlp.apply(x, *weights, approximate)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def _is_streamed(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
            return False  # a graph is being made: its compiler arranges the layers, and sizes may be symbols
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if not torch.is_grad_enabled() or x.numel() // x.shape[-1] * self.fc1.weight.shape[0] < LARGE_HIDDEN:
            return False
        plain = {"fc1": nn.Linear, "fc2": nn.Linear, "norm": nn.Identity}
        if any(type(getattr(self, name)) is not kind for name, kind in plain.items()):
            return False
        if type(self.act) not in (GELU, GELUTanh) or self.fc1.bias is None or self.fc2.bias is None:
            return False
        dropping = self.training and max(self.drop1.p, self.drop2.p) > 0.0
        return not dropping and not any(_has_hooks(module) for module in self.children())


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


class _StreamedMlp(torch.autograd.Function):
    """``fc2(gelu(fc1(x)))``, some tokens at a time; the backward pass repeats the activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str
    ) -> Tensor:
        tokens = x.flatten(0, -2)
        hidden = tokens.new_empty(len(tokens), len(weight1))
        output = tokens.new_empty(len(tokens), len(weight2))
        (activated,) = _buffers(hidden, 1)
        for part in _parts(hidden):
            size = part.stop - part.start
            torch.addmm(bias1, tokens[part], weight1.t(), out=hidden[part])
            torch.ops.aten.gelu.out(hidden[part], approximate=approximate, out=activated[:size])
            torch.addmm(bias2, activated[:size], weight2.t(), out=output[part])
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, hidden)
        ctx.approximate = approximate
        return output.view(*x.shape[:-1], len(weight2))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        x, weight1, _, weight2, _, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(ctx, grad_output), None)
        tokens = x.flatten(0, -2)
        grads = grad_output.reshape(-1, grad_output.shape[-1])
        needs = dict(zip(("x", "weight1", "bias1", "weight2", "bias2"), ctx.needs_input_grad, strict=False))
        of_x = torch.empty_like(tokens) if needs["x"] else None
        of_weight1, of_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        of_bias1 = weight1.new_zeros(len(weight1))
        buffers = _buffers(hidden, 2)
        for part in _parts(hidden):
            first, second = (buffer[: part.stop - part.start] for buffer in buffers)
            if needs["weight2"]:
                torch.ops.aten.gelu.out(hidden[part], approximate=ctx.approximate, out=first)
                of_weight2.addmm_(grads[part].t(), first)
            if not (needs["x"] or needs["weight1"] or needs["bias1"]):
                continue
            torch.mm(grads[part], weight2, out=first)
            torch.ops.aten.gelu_backward.grad_input(first, hidden[part], approximate=ctx.approximate, grad_input=second)
            of_bias1.add_(second.sum(0))
            if needs["weight1"]:
                of_weight1.addmm_(second.t(), tokens[part])
            if of_x is not None:
                torch.mm(second, weight1, out=of_x[part])
        of_x = None if of_x is None else of_x.view(x.shape)
        return of_x, of_weight1, of_bias1, of_weight2, grads.sum(0), None


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> list[Optional[Tensor]]:
    """The gradients as functions of the inputs, for second derivatives."""
    inputs = ctx.saved_tensors[:5]
    x, weight1, bias1, weight2, bias2 = inputs
    output = F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=ctx.approximate), weight2, bias2)
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


def _parts(hidden: Tensor) -> list[slice]:
    tokens, step = len(hidden), max(1, HIDDEN_IN_CACHE // hidden.shape[1])
    return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


def _buffers(hidden: Tensor, count: int) -> list[Tensor]:
    """Room for a part of the hidden map, for each of the steps between two products."""
    part = _parts(hidden)[0]
    return [hidden.new_empty(part.stop - part.start, hidden.shape[1]) for _ in range(count)]


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3 x 3 convolution of a channels-last map (B, H, W, C), initialised for the outputs that it feeds."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        # He's normal initialisation; an input of a depthwise kernel feeds nine outputs
        nn.init.normal_(self.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript knows no super()
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=[1, 1], groups=self.groups)
        return x.permute(0, 2, 3, 1)


class DepthwiseMlp(nn.Module):
    """MLP with a depthwise 3 x 3 convolution before its activation.

    Args:
        dim: channels of the map.
        hidden_dim: channels between the two linear layers.
        drop: dropout after the activation and after the output.

    Shape:
        (B, H, W, dim) to the same.

    Source:
        PVT v2 (Wang et al., arXiv:2106.13797), section 3.2.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(gelu(self.dwconv(self.fc1(x))))))


class ConvGluMlp(nn.Module):
    """Gated linear unit whose gate passes through a depthwise convolution, ``fc2(gelu(dwconv(a)) * b)``.

    Args:
        dim: channels of the map.
        hidden_dim: channels of the gate and of what it gates.
        drop: dropout after the gate and after the output.

    Shape:
        (B, H, W, dim) to the same.

    Source:
        Convolutional GLU of TransNeXt (Shi, arXiv:2311.17132, section 3.4).
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = torch.chunk(self.fc1(x), 2, dim=-1)
        x = gelu(self.dwconv(gate)) * x
        return self.drop(self.fc2(self.drop(x)))
