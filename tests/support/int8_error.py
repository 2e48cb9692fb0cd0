"""How far a layer in INT8 may be from the same layer dequantized."""

from __future__ import annotations

import math
from typing import Final

ROUNDING: Final = 0.009
"""Error of one INT8 product here: a token's largest value is 3 to 4 times its RMS, and rounding to 127 steps of it is
an error of 0.7 to 0.9 %."""
ANOTHER_EXPERT: Final = 0.4
"""Error of a token that chooses another expert, as attention in INT8 moves its router's input: 0.15 to 0.4 in windows
of three seeds. A missing bias, factor or clamp changes every token by tens of percent."""


def largest_error(products: int, changed: float) -> float:
    """The largest error of a layer on the baseline's hidden states.

    The errors of products in a row are independent, so their squares add; so do those of the tokens.

    Args:
        products: INT8 products in a row.
        changed: share of tokens that choose another expert.
    """
    return math.sqrt(products * ROUNDING**2 + changed * ANOTHER_EXPERT**2)
