"""vicinal bench models: every step of every implementation is in the table."""

import csv
import math
from pathlib import Path

import pytest
import timm
import torch

from vicinal.__main__ import main
from vicinal.eval.bench import models
from vicinal.eval.bench.models import COUNTERPARTS, AttentionModules, plain_attention


def read_table(path: Path, *options: str) -> list[dict[str, str]]:
    assert main(["bench", "models", *options, "--repeats", "1", "--csv", str(path)]) == 0
    with path.open() as file:
        return list(csv.DictReader(file))


def test_table_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(COUNTERPARTS, "nat_pico", "test_vit")
    options = ["--models", "nat_pico", "davit_pico_vicinal", "--batch-size", "2", "--img-size", "160"]
    rows = read_table(tmp_path / "bench.csv", *options)
    expected = {("nat_pico", name) for name in ("ours", "ours, plain attention", "timm")}
    expected |= {("davit_pico_vicinal", name) for name in ("ours", "ours, plain attention")}
    cases = {(row["model"], row["step"], row["implementation"]) for row in rows}
    assert cases == {(model, step, name) for model, name in expected for step in ("inference", "training")}
    for row in rows:
        assert all(float(row[key]) > 0 and math.isfinite(float(row[key])) for key in ("ms", "peak_mib"))
        assert float(row["images_per_second"]) == pytest.approx(2e3 / float(row["ms"]))
        assert row["image"] == "2x160x160"


def test_attention_alone_takes_less_than_the_model(tmp_path: Path):
    options = ["--models", "nat_pico", "--batch-size", "2", "--img-size", "64", "--dtype", "bfloat16"]
    whole = read_table(tmp_path / "model.csv", *options)
    alone = read_table(tmp_path / "attention.csv", *options, "--part", "attention")
    assert len(whole) == len(alone)
    for model, attention in zip(whole, alone, strict=True):
        assert float(attention["peak_mib"]) < float(model["peak_mib"])


@pytest.mark.parametrize("name", ["nat_pico", "biformer_pico", "transnext_pico", "litv2_pico", "convit_pico_vicinal"])
def test_plain_attention_computes_the_same_and_is_undone(name: str):
    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, 64, 64)
    attention = AttentionModules(model, image)
    with torch.no_grad():
        expected, fused = model(image), attention(image)
        with plain_attention(model):
            assert not any(module.fused_attn for module in attention.parts)
            actual, plain = model(image), attention(image)
    assert all(module.fused_attn for module in attention.parts)
    # float32 summed in another order, over some ten layers
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.std().item())
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=0)


def test_counterparts_are_the_same_networks():
    for ours, theirs in COUNTERPARTS.items():
        if timm.is_model(ours):
            sizes = [
                sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) for name in (ours, theirs)
            ]
            assert sizes[0] == sizes[1]


def test_what_cannot_be_captured_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a GPU replays the step of one network, another may have to wait for the GPU."""

    def replay(call, repeats: int) -> float:
        if call is None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return 0.25 * repeats

    monkeypatch.setattr(models, "replayed_seconds", replay)
    times = dict(models._replayed("nat_pico", {"ours": print, "timm": None}, 2))
    assert times == {"ours, replayed": 0.5}
    printed = capsys.readouterr().err
    assert "nat_pico, timm: no CUDA graph: operation not permitted when stream is capturing\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--graphs"], "a CUDA graph needs --device cuda"),
        (["--models", "davit_tiny_vicinall"], "did you mean davit_tiny_vicinal"),
        (["--repeats", "0"], "--repeats 0"),
        (["--models", "shvit_pico_vicinal", "--part", "attention"], "no attention modules with a plain form"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "models", *options]) == 2
    assert message in capsys.readouterr().err
