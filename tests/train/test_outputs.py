"""What cannot be written is refused before the work, in one line, and looking for it leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.outputs import check_output_file, check_output_folder


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with a file, a folder, a device's link and a pipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "--json folder: is a folder; give a file"),
        ("", "--json .: is a folder"),
        ("null", "--json null: is no regular file"),
        ("pipe", "--json pipe: is no regular file"),
        ("file/x.json", "--json file/x.json: file is a file, not a folder"),
        ("file/new/x.json", "--json file/new/x.json: file is a file, not a folder"),
        ("x" * 300, "cannot be written: File name too long"),
        ("x" * 254, "cannot be written: File name too long"),  # there is no room for the temporary file's suffix
        ("/proc/nothing/x.json", "cannot be written: "),
    ],
)
def test_files_that_cannot_be_written(places, path, message):
    before = sorted(places.iterdir())
    with pytest.raises(UserError) as caught:
        check_output_file("--json", path)
    assert message in str(caught.value)
    assert sorted(places.iterdir()) == before


@pytest.mark.parametrize(("path", "message"), [("file", "is a file"), ("file/x", "file is a file"), ("null", "a file")])
def test_folders_that_cannot_be_written(places, path, message):
    with pytest.raises(UserError, match=f"--output {path}: .*{message}"):
        check_output_folder("--output", path)


def test_what_can_be_written_is_let_pass_and_untouched(places):
    before = sorted(places.rglob("*"))
    assert check_output_file("--json", "file") == Path("file")
    assert check_output_file("--output", "new/deep/x.SVG", ("png", "svg")) == Path("new/deep/x.SVG")
    assert check_output_folder("--output", "folder") == Path("folder")
    assert check_output_folder("--output", "new/run") == Path("new/run")
    assert sorted(places.rglob("*")) == before
    assert (places / "file").read_text() == "x"


def test_a_full_disk_and_a_protected_file(places, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(UserError, match=r"--json x\.json: cannot be written: No space left on device"):
            check_output_file("--json", "x.json")
    assert not list(places.glob(".x.json*"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="--json file: is write-protected"):
        check_output_file("--json", "file")


def test_a_name_that_the_file_system_cannot_hold(places, monkeypatch):
    def encode(*_, **__):
        raise UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr("tempfile.mkstemp", encode)
    with pytest.raises(UserError, match="in the encoding ascii; set PYTHONUTF8=1"):
        check_output_folder("--output", "ü")


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "run", "--json"),
        ("data", "check", "digits", "--json"),
        ("plot", "run", "--output"),
        ("bench", "ops", "--csv"),
        ("bench", "models", "--csv"),
        ("bench", "train", "--csv"),
        ("shapes",),
        ("train", "--output"),
        ("train", "--dry-run", "--output"),
    ],
    ids=" ".join,
)
def test_every_command_refuses_before_its_work(places, command, monkeypatch, capsys):
    for work in ("train.build.open_images", "train.data.check.open_images", "eval.classify.open_images"):
        monkeypatch.setattr(f"vicinal.{work}", None)
    for work in ("bench.ops.measure", "bench.models._measure", "bench.train.measure_loop", "plot.draw_curves"):
        monkeypatch.setattr(f"vicinal.eval.{work}", None)
    assert main([*command, "file/x.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("file/x.png: file is a file, not a folder; give another place")
