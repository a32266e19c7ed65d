"""halo_attention computes what its definition says, on every backend, dtype and layout."""

import random
from dataclasses import dataclass

import pytest
import torch
from operator_testing import LAYOUTS, assert_as_accurate, random_inputs, run_with_gradients, subsets, sweep
from timm.layers.halo_attn import HaloAttn
from torch import Tensor

from vicinal.kernels import backend, halo_attention, window_attention
from vicinal.kernels.halo import aggregate, halo_attention_weights, tiled
from vicinal.kernels.tiling import Budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value", "relative_height_logits", "relative_width_logits")


@dataclass(frozen=True)
class Case:
    blocks: tuple[int, int]
    block: int
    halo: int
    stride: int = 1
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    relative: str = "both"
    layout: str = "contiguous"
    mask_padding: bool = False
    scale: float | None = None

    def inputs(self) -> dict[str, Tensor]:
        def tensor(stride: int, channels: int, seed: int) -> Tensor:
            size = [count * self.block // stride for count in self.blocks]
            return random_inputs((self.batch, *size, self.heads, channels), self.dtype, self.layout, seed)[0]

        tensors = [tensor(self.stride, self.head_dim, 0), tensor(1, self.head_dim, 1), tensor(1, self.value_dim, 2)]
        tensors += [tensor(self.stride, self.block + 2 * self.halo, seed) for seed in (3, 4)]
        absent = {"both": (), "none": TENSORS[3:], "height": TENSORS[4:], "width": TENSORS[3:4]}[self.relative]
        return {name: x for name, x in zip(TENSORS, tensors, strict=True) if name not in absent}

    @property
    def options(self) -> dict[str, object]:
        return {"block_size": self.block, "halo_size": self.halo}

    def run(self, **tensors: Tensor) -> Tensor:
        return halo_attention(**tensors, **self.options, mask_padding=self.mask_padding, scale=self.scale)


def draw(generator: random.Random) -> Case:
    block = generator.choice([1, 2, 4, 7, 8])
    return Case(
        blocks=(generator.choice([1, 2, 3]), generator.choice([1, 2, 3])),
        block=block,
        halo=generator.choice([0, 1, 2, 3, 5]),
        stride=generator.choice([1, 2]) if block % 2 == 0 else 1,
        batch=generator.choice([1, 3]),
        heads=generator.choice([1, 2, 3]),
        head_dim=generator.choice([1, 8, 16, 40]),
        value_dim=generator.choice([1, 8, 24]),
        dtype=generator.choice(DTYPES),
        relative=generator.choice(["both", "both", "none", "height", "width"]),
        layout=generator.choice(LAYOUTS),
        mask_padding=generator.choice([False, True]),
        scale=generator.choice([None, None, 0.0, -0.3, 1.0]),
    )


def listed(case: Case, **tensors: Tensor) -> Tensor:
    """The definition: the keys of each block listed one by one, in the dtype of the inputs."""
    query, key, value, *_ = tensors.values()
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    size, window = case.block // case.stride, case.block + 2 * case.halo
    rows = []
    for block_row in range(case.blocks[0]):
        columns = []
        for block_column in range(case.blocks[1]):
            cells = [
                (block_row * case.block + y - case.halo, block_column * case.block + x - case.halo)
                for y in range(window)
                for x in range(window)
            ]
            inside = torch.tensor([0 <= y < key.shape[1] and 0 <= x < key.shape[2] for y, x in cells])
            at = [(y % key.shape[1], x % key.shape[2]) for y, x in cells]
            keys, values = (
                torch.stack([tokens[:, y, x] for y, x in at], 2) * inside[:, None].to(tokens.dtype)
                for tokens in (key, value)
            )  # (batch, heads, keys, channels)
            area = (
                slice(block_row * size, (block_row + 1) * size),
                slice(block_column * size, (block_column + 1) * size),
            )
            scores = torch.einsum("byxhd,bhkd->byxhk", query[:, area[0], area[1]], keys) * scale
            if "relative_height_logits" in tensors:
                scores = scores + tensors["relative_height_logits"][:, area[0], area[1]].repeat_interleave(window, -1)
            if "relative_width_logits" in tensors:
                scores = scores + tensors["relative_width_logits"][:, area[0], area[1]].repeat(1, 1, 1, 1, window)
            if case.mask_padding:
                scores = scores.masked_fill(~inside, float("-inf"))
            columns.append(torch.einsum("byxhk,bhkd->byxhd", scores.softmax(-1), values))
        rows.append(torch.cat(columns, 2))
    return torch.cat(rows, 1)


def check_against_definition(case: Case, score: float = 0.0) -> None:
    """Args: score: as in :func:`assert_as_accurate`."""
    tensors = case.inputs()
    actual = run_with_gradients(case.run, tensors, tensors)
    baseline = run_with_gradients(lambda **leaves: listed(case, **leaves), tensors, tensors)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = run_with_gradients(lambda **leaves: listed(case, **leaves).to(case.dtype), doubles, doubles)
    exact["output"] = listed(case, **doubles)
    for name, tensor in actual.items():
        assert_as_accurate(name, tensor, baseline[name], exact[name], score)


@pytest.mark.parametrize("case", sweep(draw, 60))
def test_tiled_against_the_definition(case: Case) -> None:
    check_against_definition(case)


@pytest.mark.parametrize("case", sweep(draw, 20, seed=1))
def test_reference_against_the_definition(case: Case) -> None:
    with backend("reference"):
        check_against_definition(case)


def test_chunks_of_rows_and_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks cut the map between rows of blocks, whose windows overlap; large ones hold several images."""
    case = Case(blocks=(3, 2), block=4, halo=3, batch=3, mask_padding=True, dtype=torch.float64)
    expected = run_with_gradients(case.run, case.inputs(), TENSORS)
    for scores in (1, 2 * 2 * 2 * 400, 1 << 30):
        monkeypatch.setattr(tiled, "BUDGET", Budget(scores))
        actual = run_with_gradients(case.run, case.inputs(), TENSORS)
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_timms_halo_attention(stride: int) -> None:
    torch.manual_seed(0)
    module = HaloAttn(12, 24, stride=stride, num_heads=2, block_size=4, halo_size=2, qk_ratio=0.7).double()
    x = torch.randn(2, 12, 8, 12, dtype=torch.float64)
    query = module.q(x).unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2)
    key, value = module.kv(x).unflatten(1, (2, -1)).permute(0, 3, 4, 1, 2).split([8, 12], -1)
    tables = (module.pos_embed.height_rel, module.pos_embed.width_rel)
    offset = torch.arange(8)[None, :] - torch.arange(4 // stride)[:, None] + 7  # key - query + window - 1
    height, width = (torch.einsum("byxhd,qkd->byxhqk", query, table[offset]) for table in tables)
    row = torch.arange(8 // stride) % (4 // stride)
    column = torch.arange(12 // stride) % (4 // stride)
    height = height.gather(4, row[None, :, None, None, None, None].expand(*height.shape[:4], 1, 8)).squeeze(4)
    width = width.gather(4, column[None, None, :, None, None, None].expand(*width.shape[:4], 1, 8)).squeeze(4)
    output = halo_attention(query, key, value, 4, 2, relative_height_logits=height, relative_width_logits=width)
    torch.testing.assert_close(output.flatten(3).permute(0, 3, 1, 2), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_gradcheck(name: str, mask_padding: bool) -> None:
    case = Case((2, 1), 2, 1, 2, 1, 1, 3, 2, torch.float64, mask_padding=mask_padding)
    leaves = [tensor.requires_grad_() for tensor in case.inputs().values()]
    with backend(name):
        assert torch.autograd.gradcheck(lambda *values: case.run(**dict(zip(TENSORS, values, strict=True))), leaves)


@pytest.mark.parametrize("wanted", subsets(TENSORS), ids="+".join)
def test_gradients_of_a_subset(wanted: tuple[str, ...]) -> None:
    case = Case((2, 2), 2, 1)
    expected = run_with_gradients(case.run, case.inputs(), TENSORS)
    actual = run_with_gradients(case.run, case.inputs(), wanted)
    assert set(actual) == {"output", *(f"grad_{name}" for name in wanted)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_halo_of_zero_is_window_attention() -> None:
    inputs = random_inputs((2, 8, 12, 2, 8), torch.float64)
    torch.testing.assert_close(halo_attention(*inputs, 4, 0), window_attention(*inputs, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    inputs = [(tensor * 100).requires_grad_() for tensor in random_inputs((1, 8, 8, 1, 16), dtype)]
    output = halo_attention(*inputs, 4, 2, mask_padding=True)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_weights_logsumexp_and_aggregate() -> None:
    case = Case((2, 3), 4, 1, stride=2, value_dim=5, dtype=torch.float64, mask_padding=True)
    tensors = case.inputs()
    value = tensors.pop("value")
    weights = halo_attention_weights(**tensors, **case.options, mask_padding=True)
    assert weights.shape == (2, 4, 6, 2, 36)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6, 2, dtype=torch.float64))
    torch.testing.assert_close(aggregate(weights, value, 4, 1), case.run(**tensors, value=value))
    logits = [tensors[name] for name in TENSORS[3:]]
    _, logsumexp = torch.ops.vicinal.halo_attention(tensors["query"], tensors["key"], value, 4, 1, *logits, True)
    # the first query sees the first token of its own block, one row and column into the window
    score = (tensors["query"][:, 0, 0] * tensors["key"][:, 0, 0]).sum(-1) * 8**-0.5
    score = score + logits[0][:, 0, 0, :, 1] + logits[1][:, 0, 0, :, 1]
    torch.testing.assert_close((score - logsumexp[:, 0, 0]).exp(), weights[:, 0, 0, :, 7])


MAP = torch.randn(2, 8, 12, 2, 4)
BAD_CALLS = {
    "rank": ({"query": MAP[0]}, r"query has shape \(8, 12, 2, 4\)"),
    "integer": ({"query": MAP.long()}, "query has dtype torch.int64"),
    "key dtype": ({"key": MAP.double()}, "key has dtype torch.float64; it must be torch.float32"),
    "key heads": ({"key": MAP[..., :1, :]}, "key has shape"),
    "key device": ({"key": MAP.to("meta")}, "key is on meta; it must be on cpu"),
    "value map": ({"value": MAP[:, :4]}, "value has shape"),
    "block divides": ({"block_size": 5}, "block_size=5 must divide the height 8 of key; pad the height to 10"),
    "block zero": ({"block_size": 0}, "block_size=.* must be at least 1"),
    "block type": ({"block_size": 4.0}, "block_size=4.0 must be one int"),
    "halo negative": ({"halo_size": -1}, "halo_size=-1 must be at least 0"),
    "query map": ({"query": MAP[:, :6]}, r"query has a map of \(6, 12\); .*or half of it, \(4, 6\)"),
    "odd block": (
        {"query": MAP[:, ::2, ::2], "block_size": 1},
        r"query has a map of \(4, 6\); with block_size=1 it must be \(8, 12\), the map of key$",
    ),
    "logits shape": ({"relative_height_logits": MAP}, "relative_height_logits has shape .* must be .*, 2, 8"),
    "logits dtype": ({"relative_width_logits": MAP.long()}, "relative_width_logits has dtype"),
    "mask type": ({"mask_padding": 1}, "mask_padding=1 must be True or False"),
    "scale": ({"scale": float("nan")}, "scale=nan must be finite"),
}


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors(name: str, wrong: dict, message: str) -> None:
    call = {"query": MAP, "key": MAP, "value": MAP, "block_size": 4, "halo_size": 2, **wrong}
    with backend(name), pytest.raises(ValueError, match=message):
        halo_attention(**call)
