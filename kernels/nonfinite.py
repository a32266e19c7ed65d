"""What keeps a NaN or an infinity of one token from tokens that it has nothing to do with, in the tiled forms.

Their matrix products take in pairs of tokens that do not see each other: such a pair has a score of -inf and a weight
of 0, which hides every finite number, but -inf + NaN and 0 * NaN are NaN. So each piece of work looks whether its
result is finite, which costs one pass over it, and does the few that are not again with the products below, which leave
hidden pairs out.
"""

import math
from typing import Optional

import torch
from torch import Tensor


def is_tainted(*results: Optional[Tensor]) -> bool:
    """Whether any result of a piece may hold a NaN or an infinity; a sum that overflows counts as one.

    On a device the answer is always no: asking would wait for it.
    """
    found = [result for result in results if result is not None]
    if found[0].device.type != "cpu":
        return False
    return not all(math.isfinite(result.sum().item()) for result in found)


def hide(pairs: Tensor, hidden: Optional[Tensor], value: float) -> Tensor:
    """Set hidden pairs to a value, in place; hidden, a mask that broadcasts to the pairs, may be None."""
    return pairs if hidden is None else pairs.masked_fill_(hidden, value)


def product_of_seen(weights: Tensor, hidden: Optional[Tensor], right: Tensor) -> Tensor:
    """weights @ right as a sum over the pairs that are not hidden, whatever the hidden ones meet.

    Args:
        weights: (products, rows, pairs), of any sign, 0 where a pair is hidden.
        hidden: which pairs are, a mask that broadcasts to the weights, or None.
        right: (products, pairs, channels).
    """
    result = torch.bmm(weights, right.masked_fill(~right.isfinite(), 0.0))
    seen = torch.ones_like(weights) if hidden is None else hide(torch.ones_like(weights), hidden, 0.0)

    def meet(left: Tensor, of_right: Tensor) -> Tensor:
        """Where a pair of both kinds is seen, (products, rows, channels)."""
        return torch.bmm(seen * left, of_right.to(seen.dtype)) > 0

    positive, negative = right == float("inf"), right == float("-inf")
    for above, below, infinity in ((positive, negative, float("inf")), (negative, positive, float("-inf"))):
        result = torch.where(meet(weights > 0, above) | meet(weights < 0, below), result + infinity, result)
    indefinite = meet(torch.ones_like(weights), right.isnan()) | meet(weights == 0, positive | negative)
    return result.masked_fill_(indefinite, float("nan"))
