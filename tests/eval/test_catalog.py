"""The table of models in the README is the one that the command prints."""

from pathlib import Path

import pytest

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.eval.catalog import MARKDOWN_HEADER, describe
from vicinal.zoo.names import variants

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_lists_every_model():
    text = README.read_text()
    assert MARKDOWN_HEADER in text
    assert sorted(name for name, _ in listed_rows()) == sorted(variants())


@pytest.mark.parametrize("millions", [6, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_readme_states_what_is_measured(millions: int):
    # the larger variants take seconds each, and are of the same tables
    small = [(name, line) for name, line in listed_rows() if float(line.split("|")[3]) < millions]
    assert len(small) > 10
    for name, line in small:
        assert line == describe(name).markdown()


def listed_rows() -> list[tuple[str, str]]:
    """Name and line of each row of the README's table."""
    return [(line.split("`")[1], line) for line in README.read_text().splitlines() if line.startswith("| `")]


def test_a_row_has_the_official_figures():
    row = describe("nat_mini")
    # 2694812672: the official network's matrix products and convolutions
    assert (row.parameters, row.macs, row.input_size, row.top1) == (19984174, 2694812672, (224, 224), 81.8)
    assert describe("nat_pico").top1 is None
    assert describe("litv2_base").top1 == 83.6  # its weights for 384 pixels reach 84.7


def test_a_row_of_no_model():
    with pytest.raises(UserError, match=r"^nat_min: no such model; did you mean nat_mini, .*\?$"):
        describe("nat_min")
    with pytest.raises(UserError, match=r"^qqq: no such model; vicinal models lists ours$"):
        describe("qqq")


def test_the_command_takes_no_options(capsys):
    assert main(["models", "--all"]) == 2
    assert "takes no options" in capsys.readouterr().err
