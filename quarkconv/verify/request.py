"""The request of ``verify`` and its checks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from quarkconv.errors import UsageError

DEFAULT_TOKENS: Final = 64
MAX_TOKENS: Final = 2**20
STAGES: Final = ("bytes", "numbers")
"""What is checked beside the structure."""


def token_counts(tokens: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of tokens, each once.

    Raises:
        UsageError: there is none, or one is out of range.
    """
    counts = tuple(dict.fromkeys((tokens,) if isinstance(tokens, int) else tokens))
    if not counts or min(counts) < 1 or max(counts) > MAX_TOKENS:
        raise UsageError(
            "--tokens is out of range",
            expected=f"numbers from 1 to {MAX_TOKENS}",
            found=", ".join(map(str, counts)) or "none",
        )
    return counts


def require_valid(stages: Collection[str], layers: Collection[object] | None, seed: int) -> None:
    """Refuse a request that would check less than its caller expects.

    Raises:
        UsageError: an unknown stage, an empty list of layers, or a seed that is out of range.
    """
    unknown = [stage for stage in ([stages] if isinstance(stages, str) else stages) if stage not in STAGES]
    if unknown or isinstance(stages, str):
        raise UsageError("Invalid `stages`", expected="a list of bytes and numbers", found=repr(stages)[:100])
    if layers is not None and not layers:
        raise UsageError("`layers` is empty", expected="numbers or modules of MoE layers, or None for all")
    if not 0 <= seed < 2**32:
        raise UsageError("--seed is out of range", expected="a number from 0 to 2^32 - 1", found=str(seed))
