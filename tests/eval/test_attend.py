import pytest
import timm
import torch
from torch import nn

import vicinal.zoo  # noqa: F401
from vicinal.eval.attend import record_attention
from vicinal.zoo.blocks import AttentionModule, HaloAttention
from vicinal.zoo.names import variants

PICOS = variants("*_pico*")


def run(model, images):
    model = model.eval()
    with torch.no_grad(), record_attention(model) as records:
        logits = model(images)
    return logits, records


def test_records_every_attention_module_without_changing_the_output():
    model = timm.create_model("nat_pico", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 48)
    logits, records = run(model, images)
    assert torch.equal(model(images), logits)
    assert len(records) == sum(isinstance(module, AttentionModule) for module in model.modules())
    assert len({record.name for record in records}) == len(records)
    # The deeper maps are smaller than a neighborhood, and padded while attention runs.
    assert {record.weights.shape[1:3] for record in records} == {(16, 12), (8, 6), (4, 3), (2, 2)}
    assert all(record.weights.shape[:3] == record.received.shape for record in records)
    first = records[0]
    assert first.weights.shape[:3] == (2, 16, 12)
    assert first.received.shape == (2, 16, 12)
    for record in records:
        # A softmax in float32 over K keys: K roundings of 6e-8.
        total = record.weights.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=record.weights.shape[-1] * 6e-8)
        assert torch.isfinite(record.received).all()
        assert (record.received >= 0).all()


@pytest.mark.parametrize("name", PICOS)
def test_every_family_has_maps(name: str):
    """Weights that sum to one for every query, and what each position of the map receives of them."""
    model = timm.create_model(name, num_classes=10)
    sizes: dict[str, torch.Size] = {}
    for key, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, inputs, key=key: sizes.update({key: inputs[0].shape}))
    _, records = run(model, torch.randn(2, 3, 64, 128))
    assert records
    for record in records:
        module, size = model.get_submodule(record.name), sizes[record.name]
        rows, columns = size[2:] if getattr(module, "input_fmt", "") == "NCHW" else size[1:3]
        assert record.received.shape == (2, rows, columns)
        assert record.received.isfinite().all()
        assert (record.received >= 0).all()
        total = record.weights.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=record.weights.shape[-1] * 6e-8)


def test_halo_attention_downsamples_its_queries_and_keeps_its_keys():
    """Every query sees the whole map with equal weights, so that every position receives what uniform weights pay."""
    module = HaloAttention(8, num_heads=2, block_size=4, halo_size=4, stride=2, mask_padding=True)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    _, records = run(nn.Sequential(module), torch.randn(1, 8, 4, 4))
    assert records[0].weights.shape == (1, 2, 2, 2, 144)
    assert records[0].received.shape == (1, 4, 4)
    # of 144 cells of the window 16 lie in the map
    torch.testing.assert_close(records[0].received, torch.full((1, 4, 4), 9.0), rtol=1e-6, atol=0)


def test_hooks_are_removed():
    model = timm.create_model("nat_pico", num_classes=10)
    images = torch.randn(1, 3, 32, 32)
    _, records = run(model, images)
    count = len(records)
    model(images)
    assert len(records) == count


class Toy(nn.Module):
    """Attention over 4 tokens in a row: token 0 sees tokens 0 and 1, any other one its left neighbour and itself."""

    def __init__(self, weights):
        super().__init__()
        self.softmax = weights

    def pad(self, x):
        return nn.functional.pad(x, (0, 0, 0, 4 - x.shape[2]))

    def attention_weights(self, x):
        return self.softmax

    def aggregate(self, weights, value):
        keys = torch.tensor([[0, 1], [0, 1], [1, 2], [2, 3]])
        # value (B, 1, 4, heads, 1) -> (B, 1, 4 queries, 2 keys, heads, 1)
        return (value[:, :, keys] * weights.transpose(-1, -2)[..., None]).sum(3)

    def forward(self, x):
        return x


def test_attention_received_is_the_column_sum_over_that_of_uniform_weights():
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.75, 0.25]]).reshape(1, 1, 4, 1, 2)
    _, records = run(nn.Sequential(Toy(weights)), torch.zeros(1, 1, 4, 1))
    # Columns: 0 gets .25 + .5, 1 gets .75 + .5 + 1, 2 gets 0 + .75, 3 gets .25; uniform weights give 1, 1.5, 1, .5.
    expected = torch.tensor([0.75 / 1, 2.25 / 1.5, 0.75 / 1, 0.25 / 0.5])
    torch.testing.assert_close(records[0].received.flatten(), expected, rtol=0, atol=1e-7)


def test_padded_queries_do_not_count():
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.75, 0.25]]).reshape(1, 1, 4, 1, 2)
    _, records = run(nn.Sequential(Toy(weights)), torch.zeros(1, 1, 3, 1))
    torch.testing.assert_close(records[0].weights, weights[:, :, :3], rtol=0, atol=0)
    expected = torch.tensor([0.75 / 1, 2.25 / 1.5, 0.0 / 0.5])
    torch.testing.assert_close(records[0].received.flatten(), expected, rtol=0, atol=1e-7)


def test_constant_maps_attend_uniformly():
    """Without position bias a constant map makes uniform weights, whatever the neighbourhoods: everywhere 1."""
    model = timm.create_model("nat_pico", num_classes=10)
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name:
            nn.init.zeros_(parameter)
    module = next(module for module in model.modules() if isinstance(module, AttentionModule))
    channels = module.qkv.in_features
    _, records = run(nn.Sequential(module), torch.ones(1, 9, 11, channels))
    # A sum of at most some hundred weights on either side of a quotient.
    torch.testing.assert_close(records[0].received, torch.ones(1, 9, 11), rtol=0, atol=2e-5)
