"""Weight files: what is written can be read back, is never half there, and nothing is unpickled but tensors."""

import os
import pickle
import stat
from pathlib import Path

import pytest
import timm
import torch

import vicinal.zoo  # noqa: F401
from vicinal.checkpoints import load, save, save_model, write_atomically


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key])


def test_safetensors_round_trip(tmp_path: Path):
    path = save(tmp_path / "new" / "weights.safetensors", tensors(), {"epoch": "3"})
    assert_same(load(path), tensors())
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.safetensors"]


def test_shared_and_strided_tensors_keep_every_name(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"whole": base, "same": base, "transposed": base.T, "row": base[1]}
    assert_same(load(save(tmp_path / "w.safetensors", given)), given)


@pytest.mark.parametrize("container", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, container: str | None, prefix: str):
    state_dict = {prefix + key: value for key, value in tensors().items()}
    torch.save({container: state_dict, "epoch": 3} if container else state_dict, tmp_path / "checkpoint.pth")
    assert_same(load(tmp_path / "checkpoint.pth"), tensors())


def test_averaged_weights_come_first(tmp_path: Path):
    averaged = {key: value + 1 for key, value in tensors().items()}
    torch.save({"state_dict": tensors(), "state_dict_ema": averaged}, tmp_path / "checkpoint.pth")
    assert_same(load(tmp_path / "checkpoint.pth"), averaged)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("was-executed"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps({"state_dict": Payload()}))
    torch.save({"state_dict": Payload()}, "evil_zip.pth")
    for path in ("evil.pth", "evil_zip.pth"):
        with pytest.raises(ValueError, match=f"cannot read weights from '{path}'"):
            load(path)
    assert not Path("was-executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x08\0\0\0\0\0\0\0{broken}"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_broken_file_is_named(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read weights from '.*broken{suffix}'"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no weights at '.*nowhere\.pth'"):
        load(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"no weights at '.*model\.safetensors'"):
        load(tmp_path)


def test_a_file_without_weights_is_refused(tmp_path: Path):
    torch.save({"epoch": 3}, tmp_path / "log.pth")
    with pytest.raises(ValueError, match="no state dict found"):
        load(tmp_path / "log.pth")


def test_other_suffixes_and_entries_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"use weights\.safetensors"):
        save(tmp_path / "weights.pth", tensors())
    with pytest.raises(ValueError, match="not tensors: \\['epoch'\\]"):
        save(tmp_path / "weights.safetensors", {**tensors(), "epoch": 3})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = write_atomically(tmp_path / "note", lambda temporary: Path(temporary).write_text("old"))

    def fail(temporary: str) -> None:
        Path(temporary).write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def record_replace(source: str, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "file", lambda path: Path(path).write_bytes(b"whole"))
    assert events == ["file of 5", "rename", "folder"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path):
    (tmp_path / "plain").touch()
    path = save(tmp_path / "w.safetensors", tensors())
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_model_folder_is_rebuilt_by_timm(tmp_path: Path):
    model = timm.create_model("nat_pico", num_classes=7, in_chans=1, kernel_size=5, drop_path_rate=0.1).eval()
    save_model(tmp_path / "run", model)
    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    image = torch.randn(2, 1, 32, 40)
    with torch.no_grad():
        assert torch.equal(rebuilt(image), model(image))


def test_a_model_folder_can_hold_other_weights(tmp_path: Path):
    model = timm.create_model("nat_pico", num_classes=7)
    averaged = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    save_model(tmp_path, model, averaged)
    assert_same(load(tmp_path), averaged)
