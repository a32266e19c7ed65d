"""Whether weights are a network's, by names and shapes."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 3


def describe_misfit(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Which tensors are missing, left over, or of another shape, a few of each by name; empty where all fit.

    Args:
        given: the weights, by name.
        expected: the state dict of the network. Names alone are compared where the values have no shapes.
    """
    # Batch norm's counters are no weights, and old files have none.
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    left_over = [key for key in given if key not in expected]
    shapes = {key: (_shape_of(value), _shape_of(expected[key])) for key, value in given.items() if key in expected}
    reshaped = [f"{key} is {shape}, not {wanted}" for key, (shape, wanted) in shapes.items() if shape != wanted]
    found = {"missing": missing, "left over": left_over, "of another shape": reshaped}
    return "; ".join(
        f"{len(items)} of {len(given) if kind == 'left over' else len(expected)} tensors {kind} "
        f"({', '.join(items[:_SHOWN])}{', ...' if len(items) > _SHOWN else ''})"
        for kind, items in found.items()
        if items
    )


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def belongs_to(key: str, classifiers: str | tuple[str, ...] | None) -> bool:
    """Whether a tensor is of one of the classifiers that a pretrained_cfg names."""
    names = (classifiers,) if isinstance(classifiers, str) else classifiers or ()
    return key.startswith(tuple(f"{name}." for name in names))
