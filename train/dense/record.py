"""The config.py of a run's folder: written complete, and read as data, without running anything that stands in it."""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine.registry.registry
from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from ...checkpoints import write_atomically
from ...errors import UserError, first_line

CONFIG_FILE = "config.py"
SCOPES = ("mmengine", "mmcv", "mmdet", "mmseg")
"""The libraries whose registered components a config may name; ours are registered with them."""
_COMPONENT = re.compile(rf"(({'|'.join(SCOPES)})\.)?[A-Za-z_]\w*")
_MODULE = re.compile(rf"(vicinal\.zoo\.mmlab|{'|'.join(SCOPES)})(\.\w+)*")


def write_record(cfg: Config, folder: Path) -> None:
    """Write a complete config into a run's folder, in a form that MMEngine takes too."""
    # MMEngine replaces what stands in double braces wherever it stands, also in names of classes
    text = cfg.pretty_text.replace("{{", "{\\x7b")
    write_atomically(folder / CONFIG_FILE, lambda path: Path(path).write_text(text, "utf-8"))


def read_record(folder: Path) -> Config:
    """The config of a run's folder.

    Raises:
        UserError: no such file, or one that holds more than data, or names what no library registers.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}: give the folder of a run, or a config and --checkpoint")
    told = (
        f"if you trust it, name it as a config: {path} --checkpoint {folder / 'model.safetensors'}, which runs its code"
    )
    try:
        cfg = Config(read_assignments(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is more than data, or broken ({first_line(error)}); {told}") from error
    foreign = next(_foreign_names(cfg.to_dict()), None)
    modules = dict(cfg.get("custom_imports") or {}).get("imports", [])
    modules = [modules] if isinstance(modules, str) else modules
    foreign = foreign or next((str(module) for module in modules if not _MODULE.fullmatch(str(module))), None)
    if foreign:
        raise UserError(f"{path} asks for {foreign}, which is no registered component of {', '.join(SCOPES)}; {told}")
    import_modules_from_strings(modules)
    return cfg


@contextmanager
def registered_only() -> Iterator[None]:
    """Let MMEngine build what is registered, and nothing that a config names by the path of a Python object."""
    module = mmengine.registry.registry
    by_path = module.get_object_from_string
    module.get_object_from_string = lambda name: None
    try:
        yield
    finally:
        module.get_object_from_string = by_path


def read_assignments(text: str) -> dict[str, Any]:
    """Values by name, of a file of assignments of constants, lists, tuples and dicts; ``dict(...)`` is one.

    Raises:
        ValueError: anything else stands in it.
        SyntaxError: no Python.
    """
    values = {}
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                values[name] = _evaluate(value)
            case ast.Expr(value=ast.Constant()):  # a text that stands by itself, such as a docstring
                pass
            case _:
                raise ValueError(f"line {statement.lineno} is no assignment of data")
    return values


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items):
            return [_evaluate(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_evaluate(item) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_evaluate(key): _evaluate(value) for key, value in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=pairs) if all(pair.arg for pair in pairs):
            return {pair.arg: _evaluate(pair.value) for pair in pairs}
        case _:
            raise ValueError(f"line {node.lineno} holds code")


def _foreign_names(node: Any, key: str = "") -> Iterator[str]:
    """Values of ``type`` that are no plain name or one of a known library's, and scopes that are not known."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _foreign_names(child, name)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _foreign_names(child)
    elif node is not None:
        is_component = isinstance(node, str) and _COMPONENT.fullmatch(node)
        if (key == "type" and not is_component) or (key in ("_scope_", "default_scope") and node not in SCOPES):
            yield repr(node)
