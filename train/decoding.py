"""From bytes to an image, and what is said of those that are none."""

import io
from typing import BinaryIO

from PIL import Image

from .errors import UserError, first_line


class UnreadableImage(UserError):
    """An image that cannot be decoded; the message names it."""


def decode(source: BinaryIO | bytes, name: object) -> Image.Image:
    """Decode an image as RGB.

    Args:
        name: of the image, for the message of :class:`UnreadableImage`.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source as file, Image.open(file) as image:
            return image.convert("RGB")
    # A truncated PNG raises SyntaxError, a huge header DecompressionBombError: no narrower base covers PIL.
    except Exception as error:
        raise UnreadableImage(f"cannot read image {name}: {first_line(error)}") from error
