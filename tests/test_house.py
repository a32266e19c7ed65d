"""The house: which room may import which, what a wheel holds, and what importing costs in packages."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": {"kernels"},
    "checkpoints": {"checkpoints"},
    "zoo": {"zoo", "kernels", "checkpoints"},
    "train": {"train", "zoo", "checkpoints"},
    "eval": {"eval", "zoo", "checkpoints", "kernels", "train"},
}
HEAVY = ("triton", "mmengine", "mmdet", "tensorboard", "wandb", "onnx", "onnxruntime", "matplotlib", "sklearn", "tyro")


def imported_names(path: Path, with_deferred: bool = True) -> set[tuple[str, ...]]:
    """Full dotted names that a file imports, relative ones resolved.

    Args:
        with_deferred: also those inside functions, which run when they are called, and those for type checkers.
    """
    package = ("vicinal", *path.relative_to(ROOT).parent.parts)
    names: set[tuple[str, ...]] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names |= {(*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.body if with_deferred else [])
        elif with_deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports."""
    names = imported_names(path)
    bare = {name[0] for name in names} & set(ALLOWED)
    assert not bare, f"{path}: imports {bare} by a bare name"
    rooms = {name[1] for name in names if name[0] == "vicinal" and len(name) > 1}
    # python -m vicinal.train is another spelling of the root command
    shared = {"__version__", "command", "errors", "outputs", "timm_internals", "torch_internals"}
    return rooms - shared - ({"__main__"} if path.name == "__main__.py" else set())


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_along_the_arrows(room: str):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= ALLOWED[room], path


@pytest.mark.parametrize("module", ["errors", "command", "outputs", "timm_internals"])
def test_what_the_rooms_share_imports_no_room(module: str):
    assert imported_rooms(ROOT / f"{module}.py") == set()


@pytest.mark.parametrize("room", ALLOWED)
def test_modules_import_each_other_in_no_circle(room: str):
    """In train and eval not even by the imports inside functions."""
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in (ROOT / room).rglob("*.py")}
    modules = {("vicinal", *(parts[:-1] if parts[-1] == "__init__" else parts)): path for parts, path in files.items()}
    arrows = {
        module: {
            target
            for name in imported_names(path, with_deferred=room in ("train", "eval"))
            if (target := name if name in modules else name[:-1]) in modules and target != module
        }
        for module, path in modules.items()
    }
    assert any(arrows.values())
    while free := {module for module, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {module: targets for module, targets in arrows.items() if module not in free}
    assert not arrows, f"in a circle, or leading into one: {sorted('.'.join(module) for module in arrows)}"


def run_python(script: str, *options: str, cwd: Path) -> str:
    command = [sys.executable, *options, "-c", script]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_importing_the_models_loads_nothing_heavy(tmp_path: Path):
    script = f"""
import sys, torch, torchvision, timm
before = set(sys.modules)
import vicinal.zoo, vicinal.kernels, vicinal.checkpoints
print([name for name in {HEAVY} if name in set(sys.modules) - before])
"""
    assert run_python(script, cwd=tmp_path).strip() == "[]"


def test_the_version_is_read_without_importing_torch(tmp_path: Path):
    assert run_python("import sys, vicinal; print('torch' in sys.modules)", cwd=tmp_path).strip() == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_symlink():
            continue  # typings/vicinal leads editors to the package
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    outside = [name for name in names if not name.startswith(("vicinal/", "vicinal-"))]
    assert outside == []
    assert not [name for name in names if "test" in name or name.endswith("setup.py")]
    packaged = {name.removeprefix("vicinal/") for name in names if name.endswith((".py", ".yaml"))}
    rooms = ("configs", *ALLOWED)
    expected = {
        str(path.relative_to(ROOT))
        for room in rooms
        for kind in ("py", "yaml")
        for path in (ROOT / room).rglob(f"*.{kind}")
    }
    assert packaged == expected | {path.name for path in ROOT.glob("*.py") if path.name != "setup.py"}


def test_an_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
# the checkout's editable install answers for the name too, through a finder
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import timm, torch, vicinal.zoo
print(vicinal.__file__)
print(tuple(timm.create_model("nat_pico", num_classes=3)(torch.zeros(1, 3, 32, 32)).shape))
"""
    location, shape = run_python(script, cwd=tmp_path).strip().splitlines()
    assert Path(location).is_relative_to(site)
    assert shape == "(1, 3)"
