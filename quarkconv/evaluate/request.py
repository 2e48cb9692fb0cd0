"""What a caller asks of ``evaluate``; imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quarkconv.errors import UsageError

DEFAULT_WINDOW: Final = 2048
"""Tokens of a window of text."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that the caller sets; None for no bound."""

    max_kl: float | None = None
    min_agreement: float | None = None


def require_one_source(text: str | Path | None, token_ids: str | Path | None) -> None:
    """Refuse a request with no tokens, or with two sources of them.

    Raises:
        UsageError: neither text nor token ids are given, or both.
    """
    if (text is None) == (token_ids is None):
        raise UsageError(
            "Give either a text or token ids",
            expected="--text or --token-ids",
            found="neither" if text is None else "both",
        )
