"""Recipes that are no recipes: one line each, and nothing is taken silently."""

import pytest

from vicinal.errors import UserError
from vicinal.train.recipe import find_recipe, parse_arguments, read_recipe
from vicinal.train.strict_yaml import MOST_NODES, load_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing; a recipe has the sections model, data"),
        ("# nothing but this", "holds nothing"),
        ("- 1", "expected a mapping of names to values, got [1]"),
        ("optimizer: {lr: 1, lr: 2}", "'lr' is given twice"),
        ("run: {seed: 1}\nrun: {seed: 2}", "'run' is given twice"),
        ("model:\n\tname: x", "found character '\\t' that cannot start any token"),
        (b"model: {name: \xfc}", "'utf-8' codec can't decode byte 0xfc"),
        (bytes(range(256)), "not valid YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("[" * 1500, "nested too deeply"),
        ("model: &a [*a]", f"more than {MOST_NODES} values, or an alias of what it is part of"),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("run: {report: !!bool perhaps}", "not valid YAML"),
        ("schedule: {epochs: 2020-13-45}", "month must be in 1..12"),
        ("schedule: {epochs: " + "9" * 5000 + "}", "not valid YAML"),
        ("optimizer: {lr: " + "9" * 400 + "}", "must be positive and finite"),
        ("optimizer: {lr: .nan}", "--lr nan: must be positive and finite"),
        ("schedule: {schedule: cosin}", "expected one of cosine, linear, constant, got 'cosin'; did you mean cosine?"),
        ("model: {model_kwargs: {in_chans: 1}}", "--model-kwargs in_chans=1: images are read as RGB"),
    ],
)
def test_odd_recipes_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


def test_aliases_do_not_multiply():
    """Nine levels of nine: four hundred million values if written out, and 82 to read."""
    levels = ["a: &a [" + "x," * 9 + "]"]
    levels += [
        f"{name}: &{name} [{','.join(['*' + below] * 9)}]" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(ValueError, match="more than 10000 values"):
        load_yaml("\n".join(levels))
    assert load_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, d: 2}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 2}}


def test_places_without_a_recipe(tmp_path):
    for name, message in {
        str(tmp_path): f"--config {tmp_path}: is a folder",
        "x" * 300: "File name too long",
        "": "--config : no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_arguments(["--config", name])
    with pytest.raises(UserError, match="did you mean first_run"):
        find_recipe("frist_run")
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=f"{path}: cannot be read: "):
            read_recipe(path)


@pytest.mark.parametrize(
    ("item", "message"),
    [("x", "expected KEY=VALUE, got 'x'"), ("=1", "expected KEY=VALUE"), ("a=[1", "while parsing a flow sequence")],
)
def test_odd_options(item, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["--model-kwargs", item])
    with pytest.raises(UserError, match="--model-kwargs: 'a' is given twice"):
        parse_arguments(["--model-kwargs", "a=1", "a=2"])
