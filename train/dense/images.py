"""Images for detectors and segmenters: decoded as everywhere in the package, in the frame of their annotations."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, first_line
from ..data.decode import UPRIGHT, UnreadableImage, image_formats, open_image, read_orientation

SAMPLED = 2000
"""Files of a split that are opened before a run, spread evenly; the others are checked when they are loaded."""
THREADS = 8
"""Files that are opened at a time."""
# Back to the frame in which the file stores an image that is shown turned by a quarter.
_STORED = {5: UPRIGHT[5], 6: UPRIGHT[8], 7: UPRIGHT[7], 8: UPRIGHT[6]}


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image as RGB, turned as its EXIF orientation says, unless it was annotated as it is stored.

    Args:
        path: of the file.
        size: (width, height) of the annotations; they tell the frame where an image is turned by a quarter.

    Raises:
        UnreadableImage: a file that cannot be decoded.
        UserError: an image of another size.
    """
    image = open_image(path)
    if size is None or image.size == tuple(size):
        return image
    check_size(path, size)
    with Image.open(path, formats=image_formats()) as stored:
        return image.transpose(_STORED[read_orientation(stored)])


def check_size(path: str | Path, size: tuple[int, int]) -> bool:
    """Compare an image's size in the file's header with its annotations'.

    Returns:
        Whether the annotations are in the frame in which the file stores an image that is to be shown turned.

    Raises:
        UserError: another size in both frames.
        UnreadableImage: no image.
    """
    stored, shown = image_sizes(path)
    if tuple(size) == shown:
        return False
    if tuple(size) == stored:
        return True
    raise UserError(
        f"image {path} has {shown[0]} x {shown[1]} pixels, and its annotations are for {size[0]} x {size[1]}"
    )


def image_sizes(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) as the file stores an image, and as it is shown; pixels are not decoded."""
    try:
        with Image.open(path, formats=image_formats()) as image:
            stored = image.size
            return stored, stored[::-1] if read_orientation(image) in _STORED else stored
    # A damaged header raises what it likes: no narrower base covers PIL.
    except Exception as error:
        raise UnreadableImage(f"cannot read image {path}: {first_line(error)}") from error


def turn_upright(image: Image.Image) -> Image.Image:
    """A stored image as it is shown, in its own mode."""
    orientation = read_orientation(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_bgr(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), blue first, as OpenCV's readers return images."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


def annotated_size(results: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) that the annotations of an entry of a data set are for; None without annotations."""
    if "height" in results and "width" in results:
        return results["width"], results["height"]
    if results.get("seg_map_path"):
        return image_sizes(results["seg_map_path"])[1]
    return None


def spread(count: int, most: int) -> list[int]:
    """Places of at most so many of a list, evenly spread."""
    return list(range(count)) if count <= most else [round(index * (count - 1) / (most - 1)) for index in range(most)]
