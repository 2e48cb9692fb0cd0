"""The number of threads of a conversion."""

from __future__ import annotations

from typing import Final

DEFAULT_JOBS: Final = 4
"""They mostly wait for the disk, so that two cores serve four of them."""
MAX_JOBS: Final = 64
