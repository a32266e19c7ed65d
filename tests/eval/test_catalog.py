"""The table of models in the README is the one that the command prints."""

from pathlib import Path

import timm
from timm.models import model_entrypoint

import vicinal.zoo  # noqa: F401
from vicinal.__main__ import main
from vicinal.eval.catalog import MARKDOWN_HEADER, describe, list_rows

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_lists_every_model_as_measured():
    printed = [row.markdown() for row in list_rows()]
    text = README.read_text()
    listed = [line for line in text.splitlines() if line.startswith("| `")]
    assert MARKDOWN_HEADER in text
    assert listed == printed
    ours = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("vicinal.zoo.")]
    assert {line.split("`")[1] for line in listed} == set(ours)


def test_a_row_has_the_official_figures():
    row = describe("nat_mini")
    # 2694812672: the official network's matrix products and convolutions
    assert (row.parameters, row.macs, row.input_size, row.top1) == (19984174, 2694812672, (224, 224), 81.8)
    assert describe("nat_pico").top1 is None


def test_the_command_takes_no_options(capsys):
    assert main(["models", "--all"]) == 2
    assert "takes no options" in capsys.readouterr().err
