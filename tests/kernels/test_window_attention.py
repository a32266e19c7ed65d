"""window_attention computes what its definition says, on every backend, dtype and layout."""

import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from operator_testing import (
    LAYOUTS,
    assert_matches_definition,
    dense_attention,
    random_inputs,
    run_with_gradients,
    subsets,
    sweep,
)
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from vicinal.kernels import backend, window_attention
from vicinal.kernels.tiling import Budget
from vicinal.kernels.window import aggregate, tiled, window_attention_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value", "relative_position_bias")


@dataclass(frozen=True)
class Case:
    map: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    partition: str = "block"
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = torch.float32
    layout: str = "packed"
    scale: float | None = None

    def inputs(self) -> dict[str, Tensor]:
        shape = (self.batch, *self.map, self.heads, self.head_dim)
        tensors = dict(zip(TENSORS, random_inputs(shape, self.dtype, self.layout), strict=False))
        if self.bias_dtype:
            table = torch.randn(self.heads, *(2 * size - 1 for size in self.window))
            tensors["relative_position_bias"] = table.to(self.bias_dtype)
        return tensors

    def run(self, **tensors: Tensor) -> Tensor:
        options = {"partition": self.partition, "shift": self.shift, "scale": self.scale}
        return window_attention(window_size=self.window, **tensors, **options)


def draw(generator: random.Random) -> Case:
    window = (generator.choice([1, 2, 3, 4, 7]), generator.choice([1, 2, 5, 7]))
    counts = (generator.choice([1, 1, 2, 3]), generator.choice([1, 2, 3]))
    partition = generator.choice(["block", "block", "grid"])
    shift = tuple(generator.choice([0, size // 2, size - 1]) for size in window) if partition == "block" else (0, 0)
    return Case(
        map=tuple(size * count for size, count in zip(window, counts, strict=True)),
        window=window,
        shift=shift,
        partition=partition,
        batch=generator.choice([1, 3]),
        heads=generator.choice([1, 2, 3]),
        head_dim=generator.choice([1, 8, 24, 32, 40, 80]),
        dtype=generator.choice(DTYPES),
        bias_dtype=generator.choice([None, torch.float32, torch.bfloat16]),
        layout=generator.choice(LAYOUTS),
        scale=generator.choice([None, None, 0.0, -0.3, 1.0]),
    )


def axis_pairs(size: int, window: int, shift: int, partition: str) -> tuple[Tensor, Tensor]:
    """For each (query, key) on one axis: may they meet, and key minus query inside the window."""
    shift = 0 if window == size else shift
    meet, offset = torch.zeros(size, size, dtype=torch.bool), torch.zeros(size, size, dtype=torch.long)
    for query in range(size):
        for key in range(size):
            if partition == "grid":
                step = size // window
                meet[query, key] = query % step == key % step
                offset[query, key] = (key - query) // step
                continue
            rolled = [(position - shift) % size for position in (query, key)]
            same_window = rolled[0] // window == rolled[1] // window
            same_side = (query < shift) == (key < shift) or rolled[0] // window != size // window - 1
            meet[query, key] = same_window and same_side
            offset[query, key] = rolled[1] - rolled[0]
    return meet, offset


def dense_bias(case: Case, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(heads or 1, tokens, tokens) with -inf between tokens that share no window: the definition, pair by pair."""
    axes = zip(case.map, case.window, case.shift, strict=True)
    (meet_y, offset_y), (meet_x, offset_x) = (axis_pairs(*axis, case.partition) for axis in axes)
    tokens = case.map[0] * case.map[1]
    meet = (meet_y[:, None, :, None] & meet_x[None, :, None, :]).reshape(tokens, tokens)
    bias = torch.zeros(1, tokens, tokens, dtype=dtype)
    if table is not None:
        rows = (offset_y + case.window[0] - 1)[:, None, :, None].expand(*case.map, *case.map).reshape(tokens, tokens)
        columns = (offset_x + case.window[1] - 1)[None, :, None, :].expand(*case.map, *case.map)
        columns = columns.reshape(tokens, tokens)
        bias = table[:, rows.clamp(0, table.shape[1] - 1), columns.clamp(0, table.shape[2] - 1)].to(dtype)
    return bias.masked_fill(~meet, float("-inf"))


def dense(case: Case, **tensors: Tensor) -> Tensor:
    table = tensors.pop("relative_position_bias", None)
    bias = dense_bias(case, table, tensors["query"].dtype)
    return dense_attention(**tensors, bias=bias, scale=case.scale)


def check_against_definition(case: Case) -> None:
    assert_matches_definition(case.run, partial(dense, case), case.inputs(), case.dtype)


SPECIAL = [
    Case(map=(7, 7), window=(7, 7), shift=(3, 3)),
    Case(map=(7, 21), window=(7, 7), shift=(3, 3)),
    Case(map=(21, 21), window=(7, 7), shift=(3, 3)),
    Case(map=(14, 14), window=(7, 7), shift=(0, 6)),
    Case(map=(12, 10), window=(4, 5), shift=(1, 0), head_dim=24),
    Case(map=(12, 10), window=(4, 5), partition="grid"),
    Case(map=(2, 200), window=(2, 4), shift=(1, 2), heads=1),
    Case(map=(5, 3), window=(1, 1), bias_dtype=None),
    Case(map=(14, 14), window=(14, 14), heads=1, head_dim=64),
]


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: f"{case.map}-{case.window}-{case.shift}-{case.partition}")
def test_special_shapes(case: Case, name: str) -> None:
    with backend(name):
        check_against_definition(case)


@pytest.mark.parametrize("case", sweep(draw, 60))
def test_random_cases(case: Case) -> None:
    check_against_definition(case)


@pytest.mark.parametrize("case", sweep(draw, 20, seed=1))
def test_reference_on_random_cases(case: Case) -> None:
    with backend("reference"):
        check_against_definition(case)


@pytest.mark.parametrize("scores", [1, 1 << 12, 1 << 14])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, scores: int, partition: str) -> None:
    shift = (2, 1) if partition == "block" else (0, 0)
    case = Case(map=(16, 12), window=(4, 4), shift=shift, partition=partition, batch=5, dtype=torch.float64)
    tensors = case.inputs()
    expected = run_with_gradients(case.run, tensors, tensors)
    monkeypatch.setattr(tiled, "BUDGET", Budget(scores))
    for name, tensor in run_with_gradients(case.run, tensors, tensors).items():
        # Sums over windows change their order, and the gradient of the float32 table is rounded to float32.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shift", [0, 3])
def test_agrees_with_the_attention_of_timm_swin(shift: int) -> None:
    block = SwinTransformerBlock(16, (14, 21), num_heads=2, window_size=7, shift_size=shift, always_partition=True)
    attention = block.attn.double().eval()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, 14, 21, 16, dtype=torch.float64)
    table = attention.relative_position_bias_table.unflatten(0, (13, 13)).flip(0, 1).permute(2, 0, 1)
    query, key, value = attention.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    output = window_attention(query, key, value, 7, shift=shift, relative_position_bias=table)
    # timm masks with -100, whose weight exp(-100) is far below one rounding of float64.
    torch.testing.assert_close(attention.proj(output.flatten(-2)), block.double()._attn(x), rtol=1e-12, atol=1e-12)


def test_grid_partition_is_block_partition_of_the_transposed_axes() -> None:
    query, key, value = random_inputs((1, 12, 10, 2, 8), torch.float64)

    def reorder(tokens: Tensor) -> Tensor:
        return (
            tokens.unflatten(2, (5, 2)).unflatten(1, (4, 3)).transpose(1, 2).transpose(3, 4).flatten(1, 2).flatten(2, 3)
        )

    expected = window_attention(*(reorder(tokens) for tokens in (query, key, value)), (4, 5))
    actual = window_attention(query, key, value, (4, 5), partition="grid")
    torch.testing.assert_close(reorder(actual), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_gradcheck(name: str) -> None:
    case = Case(map=(4, 6), window=(2, 3), shift=(1, 1), dtype=torch.float64, bias_dtype=torch.float64, head_dim=3)
    tensors = case.inputs()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *values: case.run(**dict(zip(tensors, values, strict=True))), leaves)


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case(map=(8, 8), window=(4, 4), shift=(2, 2))
    tensors = case.inputs()
    expected = run_with_gradients(case.run, tensors, TENSORS)
    actual = run_with_gradients(case.run, tensors, wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_one_tensor_as_query_key_and_value() -> None:
    tokens = torch.randn(1, 4, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    separate = [tokens.detach().clone().requires_grad_() for _ in range(3)]
    grad_output = torch.randn_like(tokens)
    (together,) = torch.autograd.grad(window_attention(tokens, tokens, tokens, 2), tokens, grad_output)
    apart = torch.autograd.grad(window_attention(*separate, 2), separate, grad_output)
    torch.testing.assert_close(together, sum(apart))


@pytest.mark.parametrize("arrange", ["expanded", "permuted", "sliced"])
def test_layouts_of_the_output_gradient(arrange: str) -> None:
    shape = (2, 8, 4, 2, 8)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(shape, torch.float64)]
    grad_output = {
        "expanded": torch.randn(1, 1, 1, 2, 8, dtype=torch.float64).expand(shape),
        "permuted": torch.randn(2, 2, 8, 8, 4, dtype=torch.float64).movedim((1, 2), (-2, -1)),
        "sliced": torch.randn(2, 8, 4, 2, 16, dtype=torch.float64)[..., ::2],
    }[arrange]
    output = window_attention(*inputs, 4, shift=1)
    actual = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
    expected = torch.autograd.grad(output, inputs, grad_output.contiguous())
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    inputs = [(tensor * 100).requires_grad_() for tensor in random_inputs((1, 8, 8, 1, 16), dtype)]
    output = window_attention(*inputs, 4, shift=2)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_minus_infinity_in_the_bias_masks_a_key(name: str) -> None:
    query, key, value = random_inputs((1, 4, 4, 1, 8), torch.float32)
    table = torch.zeros(1, 3, 3)
    table[:, 1, 2] = float("-inf")  # the right neighbour
    changed = value.clone()
    changed[:, 0, 1] += 1
    with backend(name):
        first = window_attention(query, key, value, 2, relative_position_bias=table)
        second = window_attention(query, key, changed, 2, relative_position_bias=table)
    assert torch.equal(first[:, 0, 0], second[:, 0, 0])
    assert not torch.equal(first[:, 0, 1], second[:, 0, 1])
    assert first.isfinite().all()


def test_logsumexp() -> None:
    case = Case(map=(4, 6), window=(2, 3), shift=(1, 2), dtype=torch.float64)
    tensors = case.inputs()
    arguments = [tensors[name] for name in TENSORS[:3]]
    _, logsumexp = torch.ops.vicinal.window_attention(
        *arguments, [2, 3], "block", [1, 2], tensors["relative_position_bias"], None
    )
    query, key = (tensor.flatten(1, 2).transpose(1, 2) for tensor in arguments[:2])
    scores = query @ key.transpose(-1, -2) * 8**-0.5
    scores = scores + dense_bias(case, tensors["relative_position_bias"], torch.float64)
    expected = scores.logsumexp(-1).transpose(1, 2).reshape(logsumexp.shape)
    torch.testing.assert_close(logsumexp, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("partition", "shift"), [("block", (1, 2)), ("grid", (0, 0))])
def test_weights_and_aggregate(partition: str, shift: tuple[int, int]) -> None:
    case = Case(map=(4, 6), window=(2, 3), shift=shift, partition=partition, dtype=torch.float64)
    tensors = case.inputs()
    value = tensors.pop("value")
    weights = window_attention_weights(**tensors, window_size=(2, 3), partition=partition, shift=shift)
    assert weights.shape == (2, 4, 6, 2, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6, 2, dtype=torch.float64))
    output = aggregate(weights, value, (2, 3), partition, shift)
    torch.testing.assert_close(output, case.run(**tensors, value=value), rtol=1e-12, atol=1e-12)


def test_memory_of_a_shifted_map_does_not_hold_all_scores() -> None:
    """Scores of the whole batch would take 15 MB here; the output, the lse and a chunk take less."""
    query, key, value = random_inputs((4, 56, 56, 3, 8), torch.float32, "packed")
    with torch.profiler.profile(profile_memory=True) as profile:
        window_attention(query, key, value, 7, shift=3)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * tiled.BUDGET.in_cache


TENSOR = torch.randn(2, 8, 12, 2, 4)
BAD_CALLS = {
    "rank": ({"query": TENSOR[0]}, r"query has shape \(8, 12, 2, 4\)"),
    "integer": ({"query": TENSOR.long()}, "query has dtype torch.int64"),
    "key dtype": ({"key": TENSOR.double()}, "key has dtype torch.float64; it must be torch.float32"),
    "key shape": ({"key": TENSOR[:1]}, r"key has shape \(1, 8, 12, 2, 4\)"),
    "fewer key heads": ({"key": TENSOR[..., :1, :]}, "key has shape"),
    "value head_dim": ({"value": TENSOR[..., :2]}, "value has shape"),
    "key device": ({"key": TENSOR.to("meta")}, "key is on meta; it must be on cpu"),
    "window divides": ({"window_size": 5}, "must divide the height 8 of query; pad the height to 10"),
    "window divides width": ({"window_size": (4, 5)}, "must divide the width 12 of query; pad the width to 15"),
    "window length": ({"window_size": (4, 4, 4)}, r"window_size=\[4, 4, 4\] must have 1 element or 2"),
    "window type": ({"window_size": 4.0}, "window_size=4.0 must be one int"),
    "window zero": ({"window_size": 0}, "window_size=.* must be at least 1"),
    "partition": ({"partition": "tile"}, "partition='tile' must be 'block' or 'grid'"),
    "partition type": ({"partition": 3}, "partition=3 must be a string"),
    "shift of a grid": ({"partition": "grid", "shift": 2}, "shift=.* must be 0 with partition='grid'"),
    "shift too large": ({"shift": 4}, r"shift=\[4, 4\] must be at least 0 and less than window_size=\[4, 4\]"),
    "shift negative": ({"shift": (0, -1)}, "shift=.* must be at least 0"),
    "bias shape": ({"relative_position_bias": torch.zeros(2, 7, 6)}, r"it must be \(2, 7, 7\)"),
    "bias dtype": ({"relative_position_bias": torch.zeros(2, 7, 7).long()}, "relative_position_bias has dtype"),
    "scale": ({"scale": float("nan")}, "scale=nan must be finite"),
    "scale type": ({"scale": TENSOR.sum()}, "scale=.* must be a number or None"),
}


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(name: str, wrong: dict, message: str) -> None:
    call = {"query": TENSOR, "key": TENSOR, "value": TENSOR, "window_size": 4, **wrong}
    with backend(name), pytest.raises(ValueError, match=message):
        window_attention(**call)
