"""Every mistake ends a command with exit code 2 and one line on stderr that names it and the fix."""

import subprocess
import sys

import pytest
from PIL import Image

from vicinal.__main__ import main
from vicinal.train.errors import UserError


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; returns its one line on stderr."""

    def run(*arguments):
        assert main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    return run


def test_unknown_command(fails):
    assert "unknown command 'trian'; did you mean train?" in fails("trian")


def test_unknown_model(train, capsys):
    code, folder = train("--model", "test_vitt")
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--model test_vitt: no such model; did you mean test_vit" in line
    assert not folder.exists()


def test_unknown_model_option(train, capsys):
    assert train("--model-kwargs", "depht=2")[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "unknown option 'depht' in --model-kwargs; did you mean depth" in line


def test_bad_value_of_a_model_option(train, capsys):
    assert train("--model-kwargs", "num_heads=5")[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --model test_vit: ")


def test_no_released_weights(train, capsys):
    assert train("--model", "vit_base_patch16_18x2_224", "--pretrained")[0] == 2
    assert "no released weights" in capsys.readouterr().err


def test_unknown_optimizer(train, capsys):
    assert train("--optimizer", "adamww")[0] == 2
    assert "--optimizer adamww: no such optimizer; did you mean adamw" in capsys.readouterr().err


def test_bad_optimizer_option(train, capsys):
    assert train("--optimizer-kwargs", "betas_=3")[0] == 2
    assert "betas_" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "eval"])
def test_missing_dataset_folder(train, tmp_path, fails, command, capsys):
    if command == "train":
        assert "--data digit: no such folder; did you mean digits?" in fails("train", "--data", "digit")
        return
    _, folder = train("--epochs", 1)
    capsys.readouterr()
    line = fails("eval", folder, "--data", tmp_path / "nowhere", "--device", "cpu")
    assert f"--data {tmp_path / 'nowhere'}: no such folder" in line


def test_folder_without_images(fails, tmp_path):
    assert f"--data {tmp_path}: no images found" in fails("train", "--data", tmp_path)


def test_unreadable_image(train, tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / f"{number}.jpg")
    broken = tmp_path / "data" / "train" / "b" / "2.jpg"
    broken.write_text("not an image")
    code, _ = train("--data", tmp_path / "data", "--batch-size", 8, "--epochs", 1, "--workers", 1)
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"cannot read image {broken}" in line


def test_missing_config(fails):
    line = fails("train", "--config", "configs/firstrun.yaml")
    assert "--config configs/firstrun.yaml: no such file; did you mean first_run?" in line


def test_bad_yaml(fails, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [unclosed\n")
    assert f"{tmp_path / 'bad.yaml'}: not valid YAML" in fails("train", "--config", tmp_path / "bad.yaml")


def test_flags_that_contradict_each_other(fails):
    assert "--batch-size 33 is odd" in fails("train", "--batch-size", 33, "--mixup", 0.2)


def test_output_that_is_not_empty(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert train("--epochs", 1)[0] == 2
    assert "--output run: is not empty; --resume auto" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resume_without_checkpoint(train, tmp_path, capsys):
    assert train("--resume", tmp_path / "nowhere")[0] == 2
    assert "no last/ checkpoint there" in capsys.readouterr().err


def test_resume_with_another_model_or_average(train, capsys):
    train("--epochs", 1)
    capsys.readouterr()
    assert train("--epochs", 2, "--resume", "auto", "--model-kwargs", "depth=2")[0] == 2
    assert "does not fit this model" in capsys.readouterr().err
    assert train("--epochs", 2, "--resume", "auto", "--ema-decay", "0.9")[0] == 2
    assert "leave out --ema-decay" in capsys.readouterr().err


def test_resume_from_a_damaged_checkpoint(train, capsys):
    _, folder = train("--epochs", 1)
    state = folder / "last" / "trainer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    assert train("--epochs", 2, "--resume", "auto")[0] == 2
    assert "trainer.pt" in capsys.readouterr().err


def test_batch_norm_over_processes_needs_cuda(train, capsys):
    assert train("--model", "test_resnet", "--sync-bn")[0] == 2
    assert "--sync-bn: torch has SyncBatchNorm for CUDA only" in capsys.readouterr().err


def test_model_without_checkpointing_of_activations(train, monkeypatch, capsys):
    monkeypatch.delattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing")
    assert train("--grad-checkpointing")[0] == 2
    assert "--grad-checkpointing: VisionTransformer does not support it" in capsys.readouterr().err


def test_missing_device(fails):
    assert "--device tpu: expected auto, cpu, cuda or cuda:N" in fails("train", "--device", "tpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a folder with config.json"),
        ({"config.json": "{"}, "cannot be loaded"),
        ({"config.json": '{"architecture": "no_such_model"}'}, "no_such_model"),
        ({"config.json": '{"architecture": "test_vit"}', "model.safetensors": "torn"}, "cannot be loaded"),
    ],
)
def test_wrong_checkpoint(fails, tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert message in fails("eval", tmp_path, "--data", "digits", "--device", "cpu")


def test_checkpoint_that_does_not_exist(fails):
    assert "checkpoint nowhere: no such folder" in fails("eval", "nowhere")


def test_checkpoint_of_other_classes(train, fails, jpeg_tree, capsys):
    _, folder = train("--epochs", 1)
    capsys.readouterr()
    assert "has 10 classes, the data 3" in fails("eval", folder, "--data", jpeg_tree, "--device", "cpu")


def test_debug_lets_the_exception_through(train):
    with pytest.raises(UserError, match="no such folder"):
        train("--data", "nowhere", "--debug")


def test_module_ends_with_the_code_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "vicinal.train", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
