"""YAML recipes: found, checked against the dataclasses, merged below the command line, and written back."""

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from ..checkpoints import write_atomically
from ..command import parse_options
from ..errors import UserError, first_line, nearest
from .config import SECTIONS, ScheduleConfig, TrainConfig
from .strict_yaml import load_yaml, parse_scalar

RECIPES = Path(__file__).parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class TrainArguments(TrainConfig):
    """Train an image classifier. Flags override the recipe, and the recipe overrides the defaults."""

    config: str | None = None
    """YAML recipe: a file, or the name of one that comes with the package, such as first_run."""
    dry_run: bool = False
    """Build everything, make one update, show shapes, size, cost, memory and the schedule, and end."""
    overfit_batch: int = 0
    """Make so many updates on the first batch alone, say whether it is learnt by heart, and end."""
    notes: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What was not done as the recipe or the defaults have it, to be said."""

    def __post_init__(self):
        super().__post_init__()
        if self.overfit_batch < 0:
            raise UserError(f"--overfit-batch {self.overfit_batch}: must be at least 0")

    @property
    def run_config(self) -> TrainConfig:
        """What decides the run, without what is asked of this call only."""
        return TrainConfig(**{name: getattr(self, name) for name in SECTIONS})


def parse_arguments(argv: Sequence[str]) -> TrainConfig:
    """The configuration that a command line of ``vicinal train`` means."""
    return parse_command(argv).run_config


def parse_command(argv: Sequence[str]) -> TrainArguments:
    """Read the command line of ``vicinal train``, its recipe merged below it."""
    recipe = find_argument("--config", argv)
    sections = read_recipe(find_recipe(recipe)) if recipe is not None else {}
    schedule, notes = _fit_schedule(sections.get("schedule", ScheduleConfig()), argv)
    return parse_options(
        TrainArguments,
        "vicinal train",
        argv,
        default=TrainArguments(**{**sections, "schedule": schedule}, config=recipe, notes=notes),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def find_argument(flag: str, argv: Sequence[str]) -> str | None:
    """The last value of a flag that is needed before the rest is parsed, because defaults go by it."""
    value = None
    for position, argument in enumerate(argv):
        name, equals, text = argument.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            value = text
        elif position + 1 < len(argv):
            value = argv[position + 1]
    return value


def _fit_schedule(schedule: ScheduleConfig, argv: Sequence[str]) -> tuple[ScheduleConfig, tuple[str, ...]]:
    """The schedule below a command line, its warm-up and cool-down shortened where ``--epochs`` leaves them no room.

    They keep their share of the run. What the command line gives stays, and is refused later if it does not fit.

    Returns:
        The schedule, and what to say about it.
    """
    flags = {name: find_argument(f"--{name.replace('_', '-')}", argv) for name in ("epochs", "cooldown_epochs")}
    if not all(text is None or text.isdecimal() for text in flags.values()):
        return schedule, ()
    given = {name: int(text) for name, text in flags.items() if text is not None}
    epochs = given.get("epochs", schedule.epochs)
    cooldown = given.get("cooldown_epochs", schedule.cooldown_epochs)
    if schedule.warmup_epochs + cooldown < epochs or epochs == 0:
        return schedule, ()
    if "cooldown_epochs" not in given:
        cooldown = schedule.cooldown_epochs * epochs // schedule.epochs
    share = schedule.warmup_epochs / (schedule.epochs - schedule.cooldown_epochs)
    fitted = {"warmup_epochs": share * max(epochs - cooldown, 0), "cooldown_epochs": cooldown}
    beside = f" with --cooldown-epochs {cooldown}" if "cooldown_epochs" in given else ""
    notes = [
        f"{flag} {getattr(schedule, name):g} does not fit in --epochs {epochs}{beside}: {value:g} in its place"
        for name, value in fitted.items()
        if find_argument(flag := f"--{name.replace('_', '-')}", argv) is None and value != getattr(schedule, name)
    ]
    if cooldown >= epochs:
        return schedule, ()
    return dataclasses.replace(schedule, epochs=epochs, **fitted), tuple(notes)


def find_recipe(name: str) -> Path:
    """A recipe file by path, or by its name among the recipes that come with the package."""
    places = (RECIPES, RECIPES / "imagenet")
    candidates = [Path(name), *(place / f"{name}{end}" for place in places for end in ("", ".yaml"))]
    candidates.append(RECIPES / Path(*Path(name).parts[1:]))
    try:
        for path in candidates:
            if path.is_file():
                return path
    except OSError as error:
        raise UserError(f"--config {reprlib.repr(name)}: {error.strerror}") from error
    if name and Path(name).is_dir():
        raise UserError(f"--config {name}: is a folder; give a recipe in it")
    known = [path.relative_to(RECIPES).as_posix().removesuffix(".yaml") for path in list_recipes()]
    hint = nearest(Path(name).name.removesuffix(".yaml"), [Path(item).name for item in known])
    raise UserError(f"--config {name}: no such file; {hint or 'vicinal recipes lists those of the package'}")


def list_recipes() -> list[Path]:
    """The recipes that come with the package, without those that only others extend (``_name.yaml``)."""
    return sorted(path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("_"))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe into its sections.

    Its key ``extends`` names a recipe below it, relative to its own folder, whose values hold where it is silent.

    Returns:
        Section name -> section dataclass, for every section, with defaults where the recipe is silent.

    Raises:
        UserError: not YAML, an unknown section or key (with the nearest valid one), a value of the wrong type, or a
            recipe below it that is missing or leads back to it.
    """
    content = _read_merged(Path(path), ())
    return {name: _read_section(section, content.get(name), f"{path}: {name}") for name, section in SECTIONS.items()}


def _read_merged(path: Path, above: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """Keys by section, of a recipe and of those that it extends.

    Args:
        above: the recipes that led here.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # among them that of the encoding
        raise UserError(f"{path}: not valid YAML: {first_line(error)}") from error
    if content is None:
        raise UserError(f"{path}: holds nothing; a recipe has the sections {', '.join(SECTIONS)}")
    content = dict(_require_mapping(content, str(path)))
    base = content.pop("extends", None)
    _refuse_unknown(content, (*SECTIONS, "extends"), str(path))
    merged = _read_base(base, path, (*above, path.resolve())) if base is not None else {}
    for name, section in content.items():
        keys = _require_mapping(section, f"{path}: {name}")
        merged[name] = {**merged.get(name, {}), **keys}
    return merged


def _read_base(name: Any, path: Path, above: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    base = path.parent / str(name)
    if not base.is_file():
        known = sorted(item.name for item in path.parent.glob("*.yaml") if item != path)
        raise UserError(
            f"{path}: extends {name!r}, which is not there; {nearest(str(name), known) or 'see ' + str(base)}"
        )
    if base.resolve() in above:
        raise UserError(f"{path}: extends {name!r}, which extends this recipe again")
    return _read_merged(base, above)


def write_recipe(config: TrainConfig, path: str | Path) -> None:
    """Write a configuration as a complete recipe that :func:`read_recipe` reads back to an equal one, atomically."""
    text = yaml.safe_dump(as_plain(dataclasses.asdict(config)), sort_keys=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def as_plain(value: Any) -> Any:
    """The same nested mappings with lists for tuples, as YAML reads them back."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _require_mapping(content: Any, where: str) -> Mapping:
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: expected a mapping of names to values, got {reprlib.repr(content)}")
    return content


def _refuse_unknown(content: Mapping, allowed: typing.Iterable[str], where: str) -> None:
    for key in content:
        if key not in allowed:
            hint = nearest(str(key), allowed, count=1) or f"allowed: {', '.join(allowed)}"
            raise UserError(f"{where}: unknown key {reprlib.repr(key)}; {hint}")


def _read_section(section: type, content: Any, where: str) -> Any:
    content = _require_mapping(content, where)
    hints = typing.get_type_hints(section)
    _refuse_unknown(content, hints, where)
    values = {key: _coerce(value, hints[key], f"{where}.{key}") for key, value in content.items()}
    try:
        return section(**values)
    except UserError as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def _coerce(value: Any, expected: Any, where: str) -> Any:
    """A YAML value as the type that a field declares; the difference is int for float, and list for tuple."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _coerce(value, inner, where)
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_coerce(item, kind, where) for item, kind in zip(value, arguments, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): parse_scalar(item) if isinstance(item, str) else item for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if expected is float:
        value = parse_scalar(value) if isinstance(value, str) else value
        # An integer beyond what a float holds stays one, for the field's own check.
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value) if abs(value) < 2**1023 or isinstance(value, float) else value
    if expected in (int, str, bool) and type(value) is expected:
        return value
    wanted = (
        f"one of {', '.join(map(str, arguments))}" if origin is Literal else getattr(expected, "__name__", expected)
    )
    hint = nearest(str(value), map(str, arguments), count=1) if origin is Literal else ""
    raise UserError(f"{where}: expected {wanted}, got {reprlib.repr(value)}" + (f"; {hint}" if hint else ""))
