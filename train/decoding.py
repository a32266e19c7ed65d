"""What is said of an image that is none; :mod:`.decode` makes images of files."""

from .errors import UserError


class UnreadableImage(UserError):
    """An image that cannot be decoded; the message names it."""
