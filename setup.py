"""Packaging: the repository root is the package ``vicinal`` and each room is a subpackage of it."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ROOMS = ("zoo", "kernels", "train", "eval", "configs", "checkpoints")


def read_version() -> str:
    return re.search(r'__version__ = "(.+?)"', (ROOT / "__init__.py").read_text(encoding="utf-8")).group(1)


def list_packages() -> list[str]:
    """``vicinal`` and every room below it; tests and tools of the repository stay out of the wheel."""
    found = find_packages(str(ROOT), include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])
    return ["vicinal", *(f"vicinal.{name}" for name in found)]


def make_build_folder() -> str:
    """A folder outside the clone: ``pip install .`` builds in place and would leave build/ behind."""
    folder = tempfile.mkdtemp(prefix="vicinal-build-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


setup(
    name="vicinal",
    script_name="setup.py",  # so that the build leaves this file out, whoever runs it
    version=read_version(),
    description="Local-attention vision backbones for timm, with the attention operators that they share",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    zip_safe=False,
    package_dir={"vicinal": "."},
    packages=list_packages(),
    py_modules=[],
    package_data={
        "vicinal": ["py.typed"],
        "vicinal.configs": ["*.yaml", "*/*.yaml", "*/*.sbatch", "*/*.py", "*/*/*.py"],
    },
    options={"build": {"build_base": make_build_folder()}},
    exclude_package_data={"vicinal": ["setup.py"]},
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "timm>=1.0.31,<1.1",
        "pillow>=10.1",
        "safetensors>=0.4",
        "tyro>=0.9",
        "rich>=13",
        "PyYAML>=6",
    ],
    extras_require={
        "data": ["datasets>=3"],
        "demo": ["scikit-learn>=1.4", "matplotlib>=3.8", "mlxtend>=0.23"],
        "export": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
        "log": ["tensorboard>=2.14", "wandb>=0.16"],
        "detection": [
            "onedl-mmengine>=0.10.12,<0.11",
            "onedl-mmcv>=2.3.6,<2.4",
            "onedl-mmdetection>=3.5.1,<3.6",
            "onedl-mmsegmentation>=1.4.2,<1.5",
        ],
        "dev": [
            "build",
            "datasets>=3",
            "expecttest",
            "mypy",
            "pre-commit",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["vicinal = vicinal.__main__:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
