"""Synthetic scenes for detection and segmentation: rectangles, circles and triangles on texture.

Small enough to learn in minutes on a CPU, and laid out as real data is: COCO files for boxes and masks, label maps in
ADE20K's folders. Every number follows from the seed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw

from ...checkpoints import write_atomically
from ...command import check_fields, parse_options
from ...errors import UserError
from ...outputs import check_output_folder

CLASSES = ("rectangle", "circle", "triangle")
FOLDERS = {"train": "training", "val": "validation"}
# half the side of an object's square, relative to the side of the scene
SIZES = (0.08, 0.2)


@dataclass(frozen=True)
class ShapesConfig:
    """Write scenes of rectangles, circles and triangles with boxes, masks and label maps."""

    output: Annotated[str, tyro.conf.Positional]
    """Folder to write: train.json and val.json (COCO), images/ and annotations/ (ADE20K), classes.txt."""
    train_images: int = 200
    """Scenes to train on."""
    val_images: int = 50
    """Scenes to validate on."""
    img_size: int = 128
    """Height and width of a scene in pixels."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self):
        if self.img_size < 32:
            raise UserError(f"--img-size {self.img_size}: must be at least 32, or the shapes vanish")
        check_fields(self, train_images="[1, inf)", val_images="[1, inf)", seed="[0, inf)")


@dataclass(frozen=True)
class Shape:
    """An object: index into :data:`CLASSES` and outline, pairs of x and y in pixels."""

    label: int
    outline: np.ndarray


def main(argv: Sequence[str]) -> int:
    """``vicinal shapes``; returns the exit code."""
    config = parse_options(ShapesConfig, "vicinal shapes", argv)
    write_scenes(config)
    print(f"scenes: {config.output}")
    return 0


def write_scenes(config: ShapesConfig) -> Path:
    """Write both splits; returns the folder.

    Raises:
        UserError: a folder that is not empty, or cannot be written.
    """
    root = check_output_folder("OUTPUT", config.output)
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: give a new folder, or remove it")
    for number, (split, count) in enumerate((("train", config.train_images), ("val", config.val_images))):
        _write_split(root, split, count, config.img_size, np.random.default_rng((config.seed, number)))
    _write_text(root / "classes.txt", "".join(f"{name}\n" for name in ("background", *CLASSES)))
    return root


def _write_split(root: Path, split: str, count: int, size: int, random: np.random.Generator) -> None:
    folder = FOLDERS[split]
    for kind in ("images", "annotations"):
        (root / kind / folder).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        name = f"{index:05d}.png"
        picture, labels, shapes = draw_scene(size, random)
        for kind, content in (("images", picture), ("annotations", labels)):
            write_atomically(root / kind / folder / name, lambda path, content=content: content.save(path, "PNG"))
        images.append({"id": index, "file_name": f"{folder}/{name}", "width": size, "height": size})
        annotations += [{"id": len(annotations) + place, **_annotate(index, s)} for place, s in enumerate(shapes, 1)]
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    _write_text(root / f"{split}.json", json.dumps(content))


def draw_scene(size: int, random: np.random.Generator) -> tuple[Image.Image, Image.Image, list[Shape]]:
    """A scene of one to four shapes that do not touch.

    Returns:
        The picture, its label map (0 for the background, then :data:`CLASSES`), and the shapes.
    """
    coarse = Image.fromarray(random.integers(60, 200, (8, 8, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
    texture = np.clip(texture + random.integers(-25, 26, texture.shape), 0, 255).astype(np.uint8)
    picture, labels = Image.fromarray(texture), Image.new("L", (size, size))
    shapes = []
    for square in _place_squares(size, int(random.integers(1, 5)), random):
        shape = _draw_shape(square, random)
        outline = [tuple(point) for point in shape.outline]
        ImageDraw.Draw(picture).polygon(outline, fill=tuple(random.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(labels).polygon(outline, fill=shape.label + 1)
        shapes.append(shape)
    return picture, labels, shapes


def _place_squares(size: int, count: int, random: np.random.Generator) -> list[tuple[int, int, int]]:
    """Centres and half sides of squares that do not overlap; fewer than ``count`` where they find no place."""
    squares: list[tuple[int, int, int]] = []
    for _ in range(20 * count):
        if len(squares) == count:
            break
        half = int(random.integers(round(SIZES[0] * size), round(SIZES[1] * size) + 1))
        x, y = random.integers(half, size - half, 2).tolist()
        if all(max(abs(x - other_x), abs(y - other_y)) > half + other for other_x, other_y, other in squares):
            squares.append((x, y, half))
    return squares


def _draw_shape(square: tuple[int, int, int], random: np.random.Generator) -> Shape:
    x, y, half = square
    label = int(random.integers(len(CLASSES)))
    if label == 0:
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, random.uniform(0.5, 1)]
    else:
        # a circle of 32 corners, or a triangle turned at random
        angles = np.linspace(0, 2 * np.pi, 32 if label == 1 else 3, endpoint=False)
        angles = angles if label == 1 else angles + random.uniform(0, 2 * np.pi)
        corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Shape(label, np.rint(corners * half + [x, y]).astype(int))


def _annotate(image: int, shape: Shape) -> dict:
    """COCO's entry for one object; a box covers its last pixels."""
    low, high = shape.outline.min(0), shape.outline.max(0)
    x, y = shape.outline.T.astype(float)
    area = 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
    return {
        "image_id": image,
        "category_id": shape.label + 1,
        "bbox": [*low.tolist(), *(high - low + 1).tolist()],
        "area": area,
        "iscrowd": 0,
        "segmentation": [shape.outline.flatten().tolist()],
    }


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
