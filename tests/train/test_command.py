import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from vicinal import __version__
from vicinal.__main__ import main
from vicinal.train.errors import run_command


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
