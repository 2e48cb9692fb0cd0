"""How many random examples a property is tested with: a few in `make test`, many in `make properties`."""

from __future__ import annotations

import os
from typing import Final

REQUESTED: Final = os.environ.get("HYPOTHESIS_EXAMPLES")


def examples(usual: int) -> int:
    """`usual`, or as many as HYPOTHESIS_EXAMPLES requests."""
    return usual if REQUESTED is None else int(REQUESTED)
