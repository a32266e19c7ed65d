"""timm's own test suite on our models."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
from filelock import FileLock

import vicinal.zoo
from vicinal.zoo.names import variants

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
LARGEST = 60e6
# One debug-sized variant of each family and layout; timm runs eleven tests on every model, and seven more on ours.
SMALL = variants("*_pico*")
TESTS_PER_MODEL = 18


def fetch_timm_tests() -> Path:
    """timm's test_models.py from its source distribution; wheels do not have it."""
    folder = CACHE / f"timm-{timm.__version__}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "timm.lock"):  # test processes share the folder
        if not folder.is_dir():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, f"timm=={timm.__version__}", "-d", str(CACHE)], check=True)
            with tarfile.open(f"{folder}.tar.gz") as archive, tempfile.TemporaryDirectory(dir=CACHE) as partial:
                archive.extractall(partial, filter="data")
                (Path(partial) / folder.name).rename(folder)
    return folder / "tests" / "test_models.py"


def variables(names: Sequence[str], timeout: int) -> dict[str, str]:
    """What the process of timm's tests is told: our models, and that vicinal is the one of this process."""
    python_path = [str(ROOT / "tests" / "acceptance"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        "VICINAL_PACKAGE": str(Path(vicinal.__file__).parent),
        "VICINAL_ACCEPTANCE": ",".join(names),
        "OMP_NUM_THREADS": "1",
        "TIMEOUT": str(timeout),
    }


def run_timm_tests(*names: str, timeout: int) -> str:
    """Run timm's tests on models of ours; returns what pytest printed."""
    tests = fetch_timm_tests()
    command = [sys.executable, "-m", "pytest", "-p", "timm_models", "-p", "no:cacheprovider", "-q", "--no-header"]
    command += ["--import-mode=importlib", "-c", os.devnull, f"--rootdir={tests.parents[1]}", str(tests)]
    environment = {**os.environ, **variables(names, timeout)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    return run.stdout


def count_passed(output: str) -> int:
    return int(re.search(r"(\d+) passed", output).group(1))


def expected_tests(name: str) -> int:
    # see timm_models.NO_POOL_TO_KEEP; and timm keeps convit_* out of its test of features
    return TESTS_PER_MODEL - name.startswith(("shvit_", "convit_"))


def list_standard_names() -> list[str]:
    sizes = {name: sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) for name in variants()}
    return sorted((name for name, size in sizes.items() if size < LARGEST), key=sizes.get)


@pytest.fixture(scope="module", autouse=True)
def timm_tests():
    return fetch_timm_tests()


def test_the_package_under_test_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Also where another one is installed, or found on PYTHONPATH, which is kept."""
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    told = variables(["nat_pico", "dinat_pico"], timeout=5)
    assert told["PYTHONPATH"] == os.pathsep.join([str(ROOT / "tests" / "acceptance"), "/some/where"])
    assert told["VICINAL_ACCEPTANCE"] == "nat_pico,dinat_pico"
    for folder, value in (("mine", 1), ("installed/vicinal", 2)):
        (tmp_path / folder / "zoo").mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / folder / "zoo" / "__init__.py").write_text(f"VALUE = {value}")
    script = "from package_under_test import use_package; import os; use_package(os.environ['VICINAL_PACKAGE']);"
    told |= {"VICINAL_PACKAGE": str(tmp_path / "mine")}
    told["PYTHONPATH"] += os.pathsep + str(tmp_path / "installed")
    command = [sys.executable, "-c", script + "import vicinal.zoo; print(vicinal.zoo.VALUE)"]
    run = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"


def test_the_plugin_takes_the_package_that_it_is_told():
    plugin = (ROOT / "tests" / "acceptance" / "timm_models.py").read_text()
    assert plugin.index('use_package(os.environ["VICINAL_PACKAGE"])') < plugin.index("import vicinal.zoo")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL)
def test_debug_sized_variants(name: str):
    assert count_passed(run_timm_tests(name, timeout=300)) >= expected_tests(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_standard_names() if name not in SMALL])
def test_every_variant_below_60m_parameters(name: str):
    assert count_passed(run_timm_tests(name, timeout=1800)) >= expected_tests(name)
