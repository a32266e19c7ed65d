"""``vicinal eval RUN`` measures what the run measured, unless told otherwise, and then says so."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vicinal.__main__ import main
from vicinal.train.data.decode import UnreadableImage
from vicinal.train.data.images import FolderImages
from vicinal.train.data.transforms import EvalDataset

LEVELS = {"dark": 20, "grey": 120, "light": 230}
FLAGS = (
    "--model",
    "test_vit",
    "--img-size",
    32,
    "--threads",
    1,
    "--device",
    "cpu",
    "--warmup-epochs",
    0,
    "--workers",
    0,
)


def write_images(root, counts, levels=LEVELS):
    """Class folders of grey images, each class at its own level, none like another."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 15, (32, 32, 3))
            Image.fromarray((levels[name] + noise).astype(np.uint8)).save(root / name / f"{number}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 60 images of three classes, half of which are the val split by seed 1; its val accuracy."""
    root = tmp_path_factory.mktemp("run")
    write_images(root / "images", dict.fromkeys(LEVELS, 20))
    data = ("--data", root / "images", "--val-fraction", 0.5, "--split-seed", 1, "--batch-size", 10)
    code = main(["train", *map(str, (*FLAGS, *data, "--epochs", 1, "--lr", 2e-4, "--output", root / "run"))])
    assert code == 0
    records = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    return root / "run", records[-1]


def measure(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.mark.parametrize("inside", ["", "best", "last"])
def test_a_run_is_measured_on_its_own_split(run, capsys, inside):
    folder, last = run
    result, err = measure(capsys, folder / inside)
    assert result["images"] == last["val_images"] == 30
    assert (result["top1"], result["loss"]) == (last["val_top1"], pytest.approx(last["val_loss"], rel=1e-6))
    assert result["data"] == str(folder.parent / "images")
    assert result["part"] == "0.5 of each class, by seed 1"
    assert "note" not in result
    assert err == ""


@pytest.mark.parametrize(
    ("flags", "images", "note"),
    [
        (("--split-seed", 2), 30, "--split-seed 2 (was 1)"),
        (("--val-fraction", 0.2), 12, "--val-fraction 0.2 (was 0.5)"),
        (("--img-size", 32, "--mean", 0.1, 0.1, 0.1), 30, "--mean [0.1, 0.1, 0.1] (was None)"),
    ],
)
def test_another_split_or_input_is_said(run, capsys, flags, images, note):
    result, err = measure(capsys, run[0], *flags)
    assert result["images"] == images
    assert result["note"] == f"not measured as the run did: {note}"
    assert err == f"note: {result['note']}\n"


def test_a_folder_of_test_images_is_measured_whole(run, capsys, tmp_path):
    write_images(tmp_path / "test", {"dark": 4, "grey": 5, "light": 6})
    result, _ = measure(capsys, run[0], "--data", tmp_path / "test")
    assert (result["images"], result["part"]) == (15, "all of it")
    assert f"--data {tmp_path / 'test'} (was {run[0].parent / 'images'})" in result["note"]
    result, _ = measure(capsys, run[0], "--data", tmp_path / "test", "--val-fraction", 0.5)
    assert result["images"] < 15
    bare = shutil.copytree(run[0] / "best", tmp_path / "bare")
    assert measure(capsys, bare, "--data", tmp_path / "test")[0]["images"] == 15


@pytest.mark.parametrize("counts", [{"light": 6, "dark": 4}, {"light": 5}])
def test_classes_are_matched_by_name(run, capsys, tmp_path, counts):
    """Where classes are missing, the others have other numbers: counted by hand with the model's."""
    write_images(tmp_path / "test", counts)
    result, err = measure(capsys, run[0], "--data", tmp_path / "test")
    model = timm.create_model(f"local-dir:{run[0] / 'best'}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    names = list(cfg["label_names"])
    right = total = 0
    for name in counts:
        for path in (tmp_path / "test" / name).iterdir():
            pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
            mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
            with torch.no_grad():
                right += int(model(((pixels - mean) / std)[None]).argmax()) == names.index(name)
            total += 1
    assert result["images"] == total
    # crop_pct resizes the image a little before the crop; a flat one stays what it is.
    assert result["top1"] == pytest.approx(100 * right / total)
    assert f"{3 - len(counts)} of 3 classes have no folder in the data" in err


def test_a_class_that_the_model_does_not_know_is_refused(run, capsys, tmp_path):
    write_images(tmp_path / "test", {"dark": 2, "purple": 2}, {"dark": 20, "purple": 90})
    assert main(["eval", str(run[0]), "--data", str(tmp_path / "test"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has 3 classes, the data 2, of which it does not know 'purple': it was trained on dark..light" in line


def test_a_model_in_parts_of_two_is_refused(run, capsys, tmp_path):
    """Its tensors, its number of classes, its architecture, or its options those of another."""
    other = timm.create_model("test_vit", num_classes=5, img_size=32).state_dict()

    def change_config(folder, **entries):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    def mix(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {**tensors, "head.weight": other["head.weight"], "head.bias": other["head.bias"]},
            folder / "model.safetensors",
        )

    def halve(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(dict(list(tensors.items())[::2]), folder / "model.safetensors")

    def drop_classifier(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if not k.startswith("head.")}, folder / "model.safetensors")

    parts = {
        "classes": lambda folder: change_config(folder, num_classes=5, model_args={"num_classes": 5, "img_size": 32}),
        "classes above": lambda folder: change_config(folder, num_classes=5),
        "architecture": lambda folder: change_config(folder, architecture="test_vit2"),
        "options": lambda folder: change_config(folder, model_args={"img_size": 32, "num_classes": 3, "depth": 5}),
        "classifier": mix,
        "half": halve,
        "no classifier": drop_classifier,
    }
    for name, change in parts.items():
        folder = shutil.copytree(run[0] / "best", tmp_path / name.replace(" ", "-"))
        change(folder)
        capsys.readouterr()
        assert main(["eval", str(folder), "--data", str(run[0].parent / "images"), "--device", "cpu"]) == 2, name
        (line,) = capsys.readouterr().err.strip().splitlines()
        # test_vit2 refuses test_vit's options before it comes to any weights.
        reason = "cannot be loaded: " if name == "architecture" else "not the weights of this test_vit: "
        assert line.startswith(f"error: checkpoint {folder}: {reason}"), line


def test_a_measure_over_no_image_is_an_error(run, capsys, monkeypatch):
    def fail(images, index):
        raise UnreadableImage(f"cannot read image {index}")

    monkeypatch.setattr(FolderImages, "load", fail)
    assert main(["eval", str(run[0]), "--max-unreadable", "100", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "none of the 30 val images can be read" in line


def test_a_run_whose_val_images_are_all_unreadable_fails(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        EvalDataset, "__getitem__", lambda dataset, index: (torch.zeros(3, 32, 32, dtype=torch.uint8), -1, ())
    )
    arguments = (*FLAGS, "--data", run[0].parent / "images", "--batch-size", 10, "--epochs", 2, "--max-unreadable", 100)
    assert main(["train", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
    assert "none of the 12 val images can be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "best").exists()


def test_a_run_without_best_says_that_the_newest_model_is_taken(run, capsys, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(folder / "best")
    manifest = json.loads((folder / "last" / "manifest.json").read_text())
    manifest["facts"]["best_epoch"] = 0
    (folder / "last" / "manifest.json").write_text(json.dumps(manifest))
    result, err = measure(capsys, folder)
    assert result["checkpoint"] == str(folder / "last")
    assert "best is not there" in err


def test_help_needs_no_checkpoint(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--help"])
    assert caught.value.code == 0
    assert "wds/" not in capsys.readouterr().out.split("--data ")[1][:80]
