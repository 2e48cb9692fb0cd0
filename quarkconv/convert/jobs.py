"""The number of threads of a conversion."""

from __future__ import annotations

from typing import Final

from quarkconv.errors import UsageError

DEFAULT_JOBS: Final = 4
"""They mostly wait for the disk, so that two cores serve four of them."""
MAX_JOBS: Final = 64


def require_jobs(jobs: int) -> None:
    """Raise :class:`UsageError` unless a number of threads is in range."""
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError("`jobs` is out of range", expected=f"1 to {MAX_JOBS}", found=str(jobs))
