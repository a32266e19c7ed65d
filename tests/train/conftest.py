"""Runs small enough for a test: timm's test_vit (0.3 M parameters) at 32 px, in this process."""

import json

import numpy as np
import pytest
from PIL import Image

from vicinal.__main__ import main

SMALL = [
    *("--model", "test_vit", "--img-size", "32", "--batch-size", "32", "--threads", "1", "--device", "cpu"),
    *("--crop", "shift", "--hflip", "0", "--warmup-epochs", "0", "--lr", "2e-3", "--log-interval", "1"),
]


@pytest.fixture
def small():
    """The flags of the small set-up."""
    return SMALL


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Call ``vicinal train`` on the small set-up; returns (exit code, run folder)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, output="run"):
        return main(["train", *SMALL, "--output", output, *map(str, arguments)]), tmp_path / output

    return call


@pytest.fixture
def records():
    """The records of a run folder, without what differs from clock to clock."""

    def read(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in line.items() if key not in ("seconds", "images_per_second", "memory")}
            for line in lines
        ]

    return read


def write_tree(root, per_class, seed):
    """Class folders of JPEGs: each class has its own colour, on noise, at sizes that differ."""
    generator = np.random.default_rng(seed)
    for name, color in {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}.items():
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            height, width = generator.integers(40, 64, 2)
            noise = generator.normal(0, 40, (height, width, 3))
            pixels = np.clip(np.asarray(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.jpg")


@pytest.fixture(scope="session")
def jpeg_tree(tmp_path_factory):
    """train/ with 8 and val/ with 5 images for each of three classes."""
    root = tmp_path_factory.mktemp("jpegs")
    write_tree(root / "train", 8, seed=0)
    write_tree(root / "val", 5, seed=1)
    return root
