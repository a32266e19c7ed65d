import os
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from vicinal import __version__
from vicinal.__main__ import main
from vicinal.errors import UserError, run_command


def test_alone_it_lists_the_commands(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("train", "eval", "report", "bench"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "eval", "report"])
def test_help_describes_the_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"vicinal {command}" in out
    if command == "train":
        assert all(flag in out for flag in ("--config", "--model ", "--data ", "--lr ", "--ema-decay", "--resume"))


@pytest.mark.parametrize("command", [["recipes"], ["doctor"], ["data", "check"]])
def test_debug_stands_beside_the_options_of_every_command(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert "--debug shows the traceback of an error" in capsys.readouterr().out
    with pytest.raises(UserError):
        main([*command, "--no-such-option", "--debug"])


def test_the_command_imports_no_room_until_it_is_told_which():
    code = "import sys, vicinal.__main__ as m; m.main([]); print('torch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False False"


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    command = [sys.executable, "-c", "from vicinal.__main__ import main; raise SystemExit(main(['doctor']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as doctor:
        assert doctor.stdout.readline().startswith("python ")
        doctor.stdout.close()
        assert doctor.stderr.read() == ""
        assert doctor.wait() == 141


def test_a_pipe_that_breaks_elsewhere_is_a_fault(tmp_path):
    def write_to_a_worker_that_is_gone(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), open(tmp_path / "read", "w") as output, redirect_stdout(output):
        run_command(write_to_a_worker_that_is_gone, [])


COMMANDS = [
    *(["train"], ["eval"], ["recipes"], ["data", "check"], ["plot"], ["report"], ["models"], ["doctor"], ["shapes"]),
    *(["bench", "ops"], ["bench", "models"], ["bench", "train"]),
    *([task, action] for task in ("detect", "segment") for action in ("train", "test", "show")),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_takes_help_and_refuses_what_it_does_not_know(command, capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as stopped:
            main([*command, flag])
        assert stopped.value.code == 0
        assert f"usage: vicinal {' '.join(command)} " in capsys.readouterr().out
    assert main([*command, "x", "--no-such-option"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert "--no-such-option" in line
    assert captured.out == ""


@pytest.mark.parametrize("command", [["bench"], ["data"], ["detect"], ["segment"], []], ids=" ".join)
def test_groups_of_commands_list_them(command, capsys):
    for flag in ("--help", "-h"):
        assert main([*command, flag]) == 0
        assert capsys.readouterr().out.startswith("usage: vicinal ")
    if command:
        assert main([*command, "nothing"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "'nothing'" in line


def test_help_of_a_command_by_its_name(capsys):
    assert main(["help"]) == 0
    assert "commands:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["help", "recipes"])
    assert stopped.value.code == 0
    assert "usage: vicinal recipes" in capsys.readouterr().out
    assert main(["help", "recipse"]) == 2
    assert "did you mean recipes?" in capsys.readouterr().err


def test_help_whose_reader_is_gone(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output, redirect_stdout(output):
        assert main(["--help"]) == 141
        # What Python still holds of it must not raise again when the file is closed.
        output.flush()
