import json

import pytest
import timm
import torch
from PIL import Image

from vicinal.__main__ import main
from vicinal.checkpoints import save_model
from vicinal.train.build import record_input
from vicinal.train.config import DataConfig
from vicinal.train.data.images import open_images
from vicinal.train.data.transforms import InputSpec


@pytest.fixture
def model_folder(tmp_path):
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    record_input(model, InputSpec((32, 32), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0), list("0123456789"))
    return save_model(tmp_path / "model", model)


def evaluate(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_accuracy_equals_counting_by_hand(model_folder, capsys, tmp_path):
    result = evaluate(capsys, model_folder, "--data", "digits", "--batch-size", 50, "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    model = timm.create_model(f"local-dir:{model_folder}", pretrained=True).eval()
    _, images = open_images(DataConfig())
    pixels = torch.stack([torch.frombuffer(bytearray(_resized(images, i)), dtype=torch.uint8) for i in range(359)])
    pixels = pixels.view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = model((pixels - 0.5) / 0.25)
    targets = torch.tensor(images.targets)
    ranked = logits.argsort(dim=1, descending=True)
    assert result["images"] == 359
    assert result["top1"] == pytest.approx(100 * float((ranked[:, 0] == targets).float().mean()), abs=1e-4)
    assert result["top5"] == pytest.approx(100 * float((ranked[:, :5] == targets[:, None]).sum()) / 359, abs=1e-4)
    loss = float(torch.nn.functional.cross_entropy(logits, targets))
    # Means of 359 float32 losses, in another order.
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


def _resized(images, index):
    return images.load(index).resize((32, 32), Image.BILINEAR).tobytes()


@pytest.mark.parametrize("batch_size", [1, 64, 400])
def test_batch_size_changes_no_count(model_folder, capsys, batch_size):
    result = evaluate(capsys, model_folder, "--batch-size", batch_size)
    reference = evaluate(capsys, model_folder, "--batch-size", 50)
    assert (result["images"], result["top1"]) == (359, reference["top1"])


def test_half_precision_stays_close(model_folder, capsys):
    full, half = (evaluate(capsys, model_folder, "--precision", precision) for precision in ("float32", "bfloat16"))
    # bfloat16 rounds to 2**-9; logits of a fresh network are of order 1, and so is the change of their loss at most.
    assert half["loss"] == pytest.approx(full["loss"], abs=0.05)
    assert half["loss"] != full["loss"]


def test_run_folder_means_its_best_model(model_folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    model_folder.rename(tmp_path / "run" / "best")
    assert evaluate(capsys, tmp_path / "run")["checkpoint"] == str(tmp_path / "run" / "best")
