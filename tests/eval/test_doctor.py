"""vicinal doctor: the report on this machine."""

import platform

import pytest
import torch

from vicinal import __version__, kernels
from vicinal.__main__ import main
from vicinal.eval import doctor
from vicinal.kernels import backend


def test_report(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"python {platform.python_version()} on ")
    assert f"vicinal {__version__}\n" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    cpu = text[text.index("\ncpu: ") :]
    operators = [name for name in vars(kernels) if name.endswith("_attention")]
    assert len(operators) == 6
    assert "(torch." not in text
    for name in operators:
        assert f"  {name}: tiled (float32)\n    fused: " in cpu
        assert f"  {name}: tiled (bfloat16)\n    fused: " in cpu


def test_it_says_what_is_forced(capsys: pytest.CaptureFixture) -> None:
    with backend("reference"):
        main(["doctor"])
    assert "window_attention: reference, because it is forced (float32)" in capsys.readouterr().out


def test_options_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--all"]) == 2
    assert "vicinal doctor takes no options, was given --all" in capsys.readouterr().err


def test_a_missing_package() -> None:
    assert doctor.installed_version("vicinal-no-such-package") == "is not installed"
