"""From a stored image to RGB, for every reader: which files are opened, and what becomes of pixels that are not RGB.

* Orientation is that of the EXIF data.
* 16-bit images are scaled by their type's range: 0 is black, 65535 white (4095 of 12 bits, 32767 of signed ones).
* 32-bit integers and floats say little of their range: it is the least of 0 to 1 (floats), 0 to 255, 0 to 65535 and the
  whole of a 32-bit type that holds the image's values. Other values, such as negative ones, make it unreadable.
* Transparent pixels show :data:`BACKGROUND`.
* Of several frames or pages the first is read; colour profiles are not applied.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ...errors import UserError, first_line


class UnreadableImage(UserError):
    """An image that cannot be decoded; the message names it."""


BACKGROUND = (255, 255, 255)
"""White, RGB: what transparent pixels show."""
REFUSED_FORMATS = {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow hands to other programs (EPS to Ghostscript), opens as any other one (IPTC), or cannot decode."""
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the number in its EXIF data."""
WHITE = "vicinal_white"
"""In ``info`` of an image of 32-bit values: the value that became white."""


def open_image(source: str | Path | bytes, name: object = None) -> Image.Image:
    """Decode an image as 8-bit RGB, upright, on :data:`BACKGROUND`.

    Args:
        source: path of a regular file, or the content of one.
        name: of the image, for the message of the error; the path if not given.

    Raises:
        UnreadableImage: no regular file, no image, an image of more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, a
            damaged one, or one of values that have no place between black and white.
    """
    with open_stored(source, name) as image:
        rgb, white = to_rgb(image)
        orientation = read_orientation(image)
        rgb = rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
        # The rest of it tells of the file: an orientation that no longer holds, for example.
        rgb.info = {} if white is None else {WHITE: white}
        return rgb


@contextmanager
def open_stored(source: str | Path | bytes, name: object = None) -> Iterator[Image.Image]:
    """An image as it is stored, decoded; whatever fails on the way or inside the block is an :class:`UnreadableImage`.

    Arguments are those of :func:`open_image`.
    """
    name = source if name is None and not isinstance(source, bytes) else name
    try:
        with _open_file(source) as file, Image.open(file, formats=image_formats()) as image:
            # Formats keep their EXIF data behind the pixels (PNG), or turn the image themselves (TIFF).
            image.load()
            yield image
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"cannot read image {name}: no image, or of a format that is not read") from error
    # A truncated PNG raises SyntaxError, a huge header DecompressionBombError: no narrower base covers PIL.
    except Exception as error:
        raise UnreadableImage(f"cannot read image {name}: {first_line(error)}") from error


def _open_file(source: str | Path | bytes) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    # Opening a FIFO would wait for somebody to write into it.
    number = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(number, "rb")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, those of plugins among them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of file names that stand for these formats, in lower case, with their dot."""
    formats = image_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def has_image_header(start: bytes) -> bool:
    """Whether a file begins as one of a format that is read: for files whose names do not say it.

    Args:
        start: the first 16 bytes, which are fewer than any image has.
    """
    if len(start) < 16:
        return False
    checks = (Image.OPEN[name][1] for name in image_formats())
    # A check may answer with the reason why such a file cannot be read.
    return any(check is not None and check(start) is True for check in checks)


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image, 1 to 8; 1 where none can be read."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data raises anything, and the pixels are whole
        return 1


def to_rgb(image: Image.Image) -> tuple[Image.Image, float | None]:
    """A decoded image of any mode as 8-bit RGB; and the value that became white, where the values decided on it.

    Raises:
        ValueError: its values have no place between black and white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB"), None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB"), None
    return image.convert("RGB"), None


def _scale(image: Image.Image) -> tuple[Image.Image, float | None]:
    """Grey values of more than 8 bits as 8-bit RGB; see :func:`to_rgb`."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits, sample_format = (tags.get(tag) or (0,) for tag in (258, 339))
    stored = (image.mode[0], bits[0], sample_format[0])
    if stored == ("I", 32, 1):
        # Pillow reads them as signed.
        values = values.view(np.uint32)
    whites = _possible_whites(image, *stored)
    low, high = float(values.min()), float(values.max())
    white = next((white for white in whites if high <= white), None)
    if white is None or low < 0:
        raise ValueError(f"its values lie between {low:g} and {high:g}, not between 0 and {whites[-1]:g}")
    if white > 65535 and high * 256 < white:
        raise ValueError(f"its values reach {high:g}, which is all black in 32 bits; store it in 8 or 16 bits")
    if tags.get(262) == 0:
        values = white - values
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = BACKGROUND[0]
    # An all black image fits in any range.
    return Image.fromarray(grey).convert("RGB"), white if len(whites) > 1 and high > 0 else None


def _possible_whites(image: Image.Image, mode: str, bits: int, sample_format: int) -> tuple[float, ...]:
    """Values that may stand for white, the least first; bits and sample format as in TIFF, 0 if not known."""
    if mode == "F":
        return 1, 255, 65535
    if (image.format == "FITS" and image.mode != "I") or (bits, sample_format) == (16, 2):
        return (32767,)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return 255, 65535, 2**32 - 1 if (bits, sample_format) == (32, 1) else 2**31 - 1
    return (4095 if bits == 12 else 65535,)
