"""Neighborhood attention: outputs and gradients of every backend against windows that are listed one by one."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_as_accurate,
    dense_attention,
    describe,
    random_inputs,
    run_with_gradients,
    seeded,
    subsets,
    sweep,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.kernels import backend
from vicinal.kernels.neighborhood import aggregate, neighborhood_attention, neighborhood_attention_weights, tiled
from vicinal.kernels.tiling import Budget
from vicinal.kernels.window import window_attention

TENSORS = ("query", "key", "value", "relative_position_bias")


@dataclass(frozen=True)
class Case:
    """A call; options as one number or one per axis, like the user gives them."""

    map: tuple[int, ...]
    kernel: tuple[int, ...] | int
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    causal: tuple[bool, ...] | bool = False
    bias: bool = True
    batch: int = 2
    heads: int = 2
    dim: int = 8
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def options(self) -> dict:
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.causal,
        }

    def per_axis(self) -> list[tuple]:
        """(size, kernel, stride, dilation, causal) of each axis."""
        columns = [self.map]
        for option in self.options.values():
            columns.append(option if isinstance(option, tuple) else (option,) * len(self.map))
        return list(zip(*columns, strict=True))

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        shape = (self.batch, *self.map, self.heads, self.dim)
        tensors = dict(zip(TENSORS, random_inputs(shape, self.dtype, self.layout, seed), strict=False))
        if self.bias:
            table = (self.heads, *(2 * kernel - 1 for _, kernel, *_ in self.per_axis()))
            generator = seeded(seed + 1)
            # Single precision tables beside half precision tokens, as under autocast.
            dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
            tensors["relative_position_bias"] = torch.randn(table, generator=generator, dtype=dtype)
        return tensors


def window(position: int, size: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The positions that one position of an axis sees, from the definition."""
    group = [other for other in range(size) if other % dilation == position % dilation]
    place = group.index(position)
    sharing = group[place // stride * stride :][:stride]  # the queries of one stride, fewer at the end of the group
    if causal:
        last = group.index(sharing[-1])
        return [token for token in group[: last + 1][-kernel:] if token <= position]
    leader = min(place // stride * stride + stride // 2, len(group) - 1)
    choices = [group[start : start + kernel] for start in range(len(group) - kernel + 1)]
    before = kernel // 2
    return min(choices, key=lambda tokens: abs(group.index(tokens[0]) - (leader - before)))


def table_index(case: Case) -> Tensor:
    """Entry of the flattened bias table for each (query, key) pair of the map, -1 where the key is not seen."""
    index = torch.zeros(1, 1, dtype=torch.long)
    visible = torch.ones(1, 1, dtype=torch.bool)
    for size, kernel, stride, dilation, causal in case.per_axis():
        offsets = torch.full((size, size), -1)
        for query in range(size):
            for key in window(query, size, kernel, stride, dilation, causal):
                offsets[query, key] = (key - query) // dilation + kernel - 1
        index = torch.kron(index, torch.ones_like(offsets)) * (2 * kernel - 1) + offsets.repeat(index.shape)
        visible = torch.kron(visible, torch.ones_like(offsets, dtype=torch.bool)) & (offsets >= 0).repeat(visible.shape)
    return index.masked_fill(~visible, -1)


def oracle(case: Case, scale: float | None = None):
    """Attention of all tokens to all tokens, with -inf where the definition has no key."""
    index = table_index(case)

    def attend(query: Tensor, key: Tensor, value: Tensor, relative_position_bias: Tensor | None = None) -> Tensor:
        if relative_position_bias is None:
            bias = torch.zeros(1, *index.shape, dtype=query.dtype)
        else:
            bias = relative_position_bias.flatten(1)[:, index.clamp(min=0)]
        return dense_attention(query, key, value, bias.masked_fill(index < 0, -math.inf), scale)

    return attend


def largest_score(tensors: dict[str, Tensor], scale: float | None = None) -> float:
    """A bound of it, from the norms of queries and keys."""
    query, key = (tensors[name].double().norm(dim=-1).max().item() for name in ("query", "key"))
    scale = tensors["query"].shape[-1] ** -0.5 if scale is None else scale
    bias = tensors.get("relative_position_bias", torch.zeros(1))
    return abs(scale) * query * key + bias[bias.isfinite()].abs().max().item()


def operator(case: Case, name: str = "tiled", **options):
    def attend(**tensors: Tensor) -> Tensor:
        with backend(name):
            return neighborhood_attention(**tensors, **case.options, **options)

    return attend


def assert_accurate(case: Case, name: str = "tiled", tensors: dict[str, Tensor] | None = None, **options) -> None:
    tensors = case.tensors() if tensors is None else tensors
    formula = oracle(case, **options)
    exact = run_with_gradients(formula, {key: tensor.double() for key, tensor in tensors.items()}, tensors)
    baseline = run_with_gradients(formula, tensors, tensors)
    score = largest_score(tensors, **options)
    for result, found in run_with_gradients(operator(case, name, **options), tensors, tensors).items():
        assert_as_accurate(f"{describe(case)} {result}", found, baseline[result], exact[result], score)


def draw(generator: random.Random) -> Case:
    """Any allowed call on a small map."""
    rank = generator.choice((1, 2, 2, 3))
    largest = {1: 80, 2: 19, 3: 9}[rank]
    kernel, stride, dilation, causal, sizes = [], [], [], [], []
    for _ in range(rank):
        kernel.append(generator.randint(1, {1: 13, 2: 8, 3: 4}[rank]))
        dilation.append(generator.randint(1, max(1, min(8, largest // kernel[-1]))))
        sizes.append(generator.randint(kernel[-1] * dilation[-1], largest))
        stride.append(generator.choice((1, 1, generator.randint(1, kernel[-1]), kernel[-1])))
        causal.append(generator.random() < 0.25)
    return Case(
        map=tuple(sizes),
        kernel=tuple(kernel),
        stride=tuple(stride),
        dilation=tuple(dilation),
        causal=tuple(causal),
        bias=generator.random() < 0.7,
        batch=generator.choice((1, 2, 3)),
        heads=generator.choice((1, 2, 3)),
        dim=generator.choice((1, 4, 8, 24)),
        dtype=generator.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
        layout=generator.choice(LAYOUTS),
    )


def ids(cases: list[Case]) -> list:
    return [pytest.param(case, id=describe(case)) for case in cases]


CORNERS = [
    Case((7, 7), 7),  # the kernel covers the map
    Case((14, 14), 14),  # the same in ViT with a relative position bias
    Case((20, 5), (20, 5)),
    Case((17,), 17, causal=True),
    Case((14, 14), 7, dilation=2),  # kernel * dilation is the map
    Case((6, 10), 3, dilation=(2, 3)),
    Case((8, 8), 7),  # the map is one larger than the kernel
    Case((15, 15), 7, dilation=2),
    Case((2, 200), (2, 7)),
    Case((200, 2), (7, 1)),
    Case((200,), 7, dilation=28),
    *(Case((21 + rest, 22), 3, dilation=(7, 6)) for rest in range(1, 7)),  # groups of two lengths
    Case((23, 19), (3, 5), dilation=(5, 3)),
    Case((9, 10), 2),  # even kernels see more tokens before than after
    Case((9, 10), (4, 6)),
    Case((31,), 2, dilation=3),
    Case((9, 9), 1),
    Case((1, 1), 1),
    Case((5, 6, 7), (1, 2, 3)),
    Case((8, 8), 4, stride=4),  # non-overlapping windows
    Case((9, 11), 4, stride=4),
    Case((16, 15), 7, stride=(2, 3)),  # strides that do not divide the map
    Case((33,), 8, stride=5),
    Case((10, 9), 5, causal=(True, False)),
    Case((10, 9), 5, causal=(False, True)),
    Case((10, 9), 5, stride=(2, 5), dilation=(2, 1), causal=True),
    Case((70,), 6, stride=4, dilation=3, causal=True),
    Case((4, 8, 9), (2, 3, 3), stride=(1, 2, 3), dilation=(2, 1, 3), causal=(True, False, False)),
    *(Case((size,), 7) for size in (31, 32, 33, 47, 48, 49, 63, 64, 65)),  # around the edges of tiles
    *(Case((size, 13), 5) for size in (13, 14, 15, 20, 21, 22)),
    *(Case((size, 4, 4), 3) for size in (7, 8, 9)),
    *(Case((16, 12), 3, dilation=2, dim=dim) for dim in (1, 24, 40, 80, 160)),
    Case((12, 12), 7, heads=1),
    *(Case((12, 10), 5, dilation=2, layout=layout) for layout in LAYOUTS),
    *(Case((10, 5, 6), 3, layout=layout, batch=3) for layout in LAYOUTS),
]


@pytest.mark.parametrize("case", ids(CORNERS))
def test_corner_cases(case: Case) -> None:
    assert_accurate(case)
    assert_accurate(replace(case, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", sweep(draw, 150))
def test_random_cases(case: Case) -> None:
    assert_accurate(case)


@pytest.mark.parametrize("case", sweep(draw, 60, seed=1))
def test_reference_on_random_cases(case: Case) -> None:
    assert_accurate(case, "reference")


@pytest.mark.parametrize("case", ids(CORNERS[::2]))
def test_reference_equals_the_definition(case: Case) -> None:
    """In float64 nothing but the order of summation differs."""
    case = replace(case, dtype=torch.float64)
    tensors = case.tensors()
    expected = run_with_gradients(oracle(case), tensors, tensors)
    for name, found in run_with_gradients(operator(case, "reference"), tensors, tensors).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize(
    "case",
    ids(
        [
            Case((5, 4), 3, dim=3),
            Case((9,), 4, stride=2, dilation=2, causal=True, dim=3),
            Case((3, 4, 5), (3, 1, 2), dilation=(1, 1, 2), dim=2),
        ]
    ),
)
def test_gradcheck(case: Case, name: str) -> None:
    tensors = {key: tensor.requires_grad_() for key, tensor in replace(case, dtype=torch.float64).tensors().items()}
    attend = operator(case, name)
    assert torch.autograd.gradcheck(
        lambda *values: attend(**dict(zip(tensors, values, strict=True))), [*tensors.values()]
    )


def test_large_map_is_computed_in_pieces() -> None:
    """More scores than one piece holds: along the batch, along both axes, and among the groups of a dilation."""
    assert_accurate(Case((30, 31), 7, batch=3, heads=4))
    assert_accurate(Case((40, 33), 5, dilation=(8, 3), batch=1, heads=8))
    assert_accurate(Case((30, 30), 29, batch=1, heads=1, dim=4))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_memory_does_not_grow_with_the_window() -> None:
    """A gather holds kernel**2 copies of the keys; no tensor here exceeds the map and one piece of scores."""
    query, key, value = random_inputs((2, 56, 56, 2, 32), torch.float32)
    options = ([7], [1], [1], [False], None, None)
    with LargestTensor() as largest:
        output, logsumexp = tiled.forward(query, key, value, *options)
        tiled.backward(output, output, logsumexp, [True, True, True, False], query, key, value, *options)
    assert largest.elements <= max(query.numel(), tiled.BUDGET.in_cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """Scores near 10,000: far beyond the range of exp without the largest subtracted."""
    case = Case((11, 12), 5, dilation=2, dtype=dtype)
    tensors = case.tensors()
    tensors["query"] = tensors["query"] * 2000
    with backend("tiled"):
        outcome = run_with_gradients(operator(case), tensors, tensors)
    assert all(tensor.isfinite().all() for tensor in outcome.values())
    if dtype == torch.float32:
        assert_accurate(case, tensors=tensors)


def test_minus_infinity_in_the_bias_masks_a_key() -> None:
    case = Case((8, 9), 3)
    tensors = case.tensors()
    tensors["relative_position_bias"][:, 1, 3] = -math.inf
    assert_accurate(case, tensors=tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.5])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    assert_accurate(Case((9, 8), 3, dtype=dtype), scale=scale)
    assert_accurate(Case((9, 8), 3), "reference", scale=scale)


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case((9, 10), 5, dilation=(1, 2))
    tensors = case.tensors()
    everything = run_with_gradients(operator(case), tensors, TENSORS)
    for name, tensor in run_with_gradients(operator(case), tensors, wanted).items():
        assert torch.equal(tensor, everything[name]), name


def test_one_tensor_as_query_key_and_value() -> None:
    case = Case((9, 8), 3, dtype=torch.float64)
    tokens = case.tensors()["query"].requires_grad_()
    gradients = [
        torch.autograd.grad(attend(query=tokens, key=tokens, value=tokens).square().sum(), tokens)[0]
        for attend in (operator(case), oracle(case))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arrange", ["expanded", "permuted", "sliced"])
def test_layouts_of_the_output_gradient(arrange: str) -> None:
    case = Case((8, 9), 3, dtype=torch.float64)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    shape = tensors["query"].shape
    grad = {
        "expanded": lambda: torch.randn(shape[-1], dtype=torch.float64).expand(shape),
        "permuted": lambda: torch.randn(shape[::-1], dtype=torch.float64).permute(4, 3, 2, 1, 0),
        "sliced": lambda: torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2],
    }[arrange]()
    found, expected = (
        torch.autograd.grad(attend(**tensors), [*tensors.values()], grad) for attend in (operator(case), oracle(case))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scores", [1, 20_000])
def test_pieces_of_any_size(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of equal tiles are halved along both axes, down to single tiles."""
    monkeypatch.setattr(tiled, "BUDGET", Budget(scores))
    assert_accurate(Case((36, 44), 3, dilation=(1, 2), batch=3))


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_empty_batch(name: str) -> None:
    case = Case((9, 8), 3, batch=0)
    outcome = run_with_gradients(operator(case, name), case.tensors(), TENSORS)
    assert outcome["output"].shape == (0, 9, 8, 2, 8)
    assert outcome["grad_key"].shape == (0, 9, 8, 2, 8)
    assert not outcome["grad_relative_position_bias"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_twice(dtype: torch.dtype) -> None:
    case = Case((30, 31), 7, dtype=dtype)
    tensors = case.tensors()
    first, second = (run_with_gradients(operator(case), tensors, TENSORS) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_memory_that_was_not_written_is_not_read(dtype: torch.dtype) -> None:
    """In deterministic mode torch fills new memory with NaN."""
    case = Case((23, 17), 5, dilation=(2, 3), causal=(True, False), dtype=dtype)
    tensors = case.tensors()
    expected = run_with_gradients(operator(case), tensors, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        found = run_with_gradients(operator(case), tensors, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_stride_of_the_kernel_is_window_attention(name: str) -> None:
    case = Case((12, 8), 4, stride=4, dtype=torch.float64)
    tensors = case.tensors()
    with backend(name):
        windows = run_with_gradients(lambda **values: window_attention(**values, window_size=4), tensors, TENSORS)
    for result, found in run_with_gradients(operator(case, name), tensors, TENSORS).items():
        torch.testing.assert_close(found, windows[result], rtol=1e-10, atol=1e-12)


def test_logsumexp() -> None:
    """Base e, over the scores with their bias."""
    case = Case((6, 7), 3, dtype=torch.float64)
    tensors = case.tensors()
    query, key, _, table = (tensors[name] for name in TENSORS)
    _, logsumexp = torch.ops.vicinal.neighborhood_attention(query, key, key, [3], relative_position_bias=table)
    index = table_index(case)
    bias = table.flatten(1)[:, index.clamp(min=0)].masked_fill(index < 0, -math.inf)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.flatten(1, 2), key.flatten(1, 2)) * 8**-0.5 + bias
    expected = scores.logsumexp(-1).transpose(1, 2).reshape(logsumexp.shape)
    torch.testing.assert_close(logsumexp, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "case", ids([Case((9, 8), 3), Case((12,), 4, stride=2, dilation=2, causal=True), Case((4, 5, 6), (2, 3, 1))])
)
def test_weights_and_aggregate(case: Case) -> None:
    """The two halves of the reference, which modules use for dropout and for attention maps."""
    tensors = case.tensors()
    options = [list(option) if isinstance(option, tuple) else [option] for option in case.options.values()]
    weights = neighborhood_attention_weights(
        tensors["query"], tensors["key"], *options, tensors["relative_position_bias"]
    )
    keys = math.prod(kernel for _, kernel, *_ in case.per_axis())
    assert weights.shape == (*tensors["query"].shape[:-1], keys)
    seen = (table_index(case) >= 0).sum(-1).reshape(case.map)
    assert torch.equal((weights[0, ..., 0, :] > 0).sum(-1), seen)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(aggregate(weights, tensors["value"], *options), operator(case, "reference")(**tensors))


BAD_CALLS = {
    "kernel larger than the map": ({"kernel_size": 9}, r"kernel_size=\[9, 9\].*axis 1, which has 8; pad the axis to 9"),
    "dilated kernel larger than the map": (
        {"kernel_size": 3, "dilation": (2, 3)},
        r"dilation=\[2, 3\] spans 9 .*axis 1, which has 8; pad the axis to 9 or use kernel_size=2",
    ),
    "kernel 0": ({"kernel_size": 0}, r"kernel_size=\[0, 0\] must be at least 1"),
    "kernel of three axes": ({"kernel_size": (3, 3, 3)}, r"kernel_size=\[3, 3, 3\] must have 1 element or 2"),
    "fractional kernel": ({"kernel_size": 3.0}, r"kernel_size=3\.0 must be one int"),
    "stride 0": ({"stride": 0}, r"stride=\[0, 0\] must be at least 1"),
    "stride above kernel": (
        {"stride": (1, 4)},
        r"stride=\[1, 4\] must be at most kernel_size=\[3, 3\] on spatial axis 1",
    ),
    "dilation 0": ({"dilation": (1, 0)}, r"dilation=\[1, 0\] must be at least 1"),
    "causal as a number": ({"is_causal": 1}, "is_causal=1 must be one bool"),
    "bias of the kernel": ({"relative_position_bias": torch.zeros(2, 3, 3)}, r"relative_position_bias.*\(2, 5, 5\)"),
    "bias of integers": ({"relative_position_bias": torch.zeros(2, 5, 5).int()}, "relative_position_bias has dtype"),
    "infinite scale": ({"scale": math.inf}, "scale=inf must be finite"),
    "scale as a tensor": ({"scale": torch.ones(())}, "scale"),
    "short key": ({"key": torch.zeros(2, 9, 7, 2, 8)}, r"key has shape \(2, 9, 7, 2, 8\)"),
    "half value": ({"value": torch.zeros(2, 9, 8, 2, 8).half()}, "value has dtype torch.float16"),
    "no map": (dict.fromkeys(TENSORS[:3], torch.zeros(2, 2, 8)), "query has shape"),
}


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(name: str, wrong: dict, message: str) -> None:
    tensors = dict.fromkeys(TENSORS[:3], torch.zeros(2, 9, 8, 2, 8))
    with backend(name), pytest.raises(ValueError, match=message):
        neighborhood_attention(**{**tensors, "kernel_size": 3, **wrong})
