"""Key maps: one module per family, each with ``LAYOUTS``, the foreign layouts that it can rename to ours."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Replacement = str | Callable[[re.Match], str]


@dataclass(frozen=True)
class Layout:
    """A foreign layout of a family's state dict.

    Attributes:
        mark: regular expression that keys of this layout alone match, from the start; one is enough.
        rules: pairs of regular expression and replacement, applied in order, all that match.
        dropped: regular expressions of entries that hold no weights (index buffers) and are left out.
        convolutions: regular expression of convolution weights that some files of the layout store as matrices.
        matrices: regular expression of weights of linear layers that the layout stores as 1 x 1 convolutions.
    """

    mark: str
    rules: tuple[tuple[str, Replacement], ...]
    dropped: tuple[str, ...] = ()
    convolutions: str | None = None
    matrices: str | None = None

    def matches(self, keys: Iterable[str]) -> bool:
        """Whether a state dict with these keys has this layout."""
        return any(re.match(self.mark, key) for key in keys)

    def rename(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under our names."""
        kept = (key for key in state_dict if not any(re.search(pattern, key) for pattern in self.dropped))
        return {self.rename_key(key): self._with_our_axes(key, state_dict[key]) for key in kept}

    def _with_our_axes(self, key: str, value: Tensor) -> Tensor:
        if self.convolutions is not None and value.ndim == 2 and re.search(self.convolutions, key):
            return value[:, :, None, None]
        if self.matrices is not None and value.ndim == 4 and re.search(self.matrices, key):
            return value[:, :, 0, 0]
        return value

    def rename_key(self, key: str) -> str:
        """Our name of one entry."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def next_stage(suffix: str = "downsample") -> Callable[[re.Match], str]:
    """For layouts that keep a downsampling step at the end of a stage: ours opens the stage that follows."""
    return lambda match: f"stages.{int(match[1]) + 1}.{suffix}"
