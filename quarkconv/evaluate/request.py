"""The request of ``evaluate`` and its checks; imports neither torch nor transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quarkconv.errors import UsageError

DEFAULT_WINDOW: Final = 2048
"""Tokens of a window of text."""
VERIFY_INSTEAD: Final = "run `quarkconv verify`: it checks INT8 experts without the model's class"
"""The next step where the model's class cannot be run."""
RECORD_CONTENT: Final = "quarkconv evaluate --record"
"""``content`` in the metadata of a file of recorded inputs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that the caller sets; None for no bound.

    Attributes:
        max_kl: of the mean KL divergence, in nats.
        min_agreement: of top-1 agreement, 0 to 1.

    Raises:
        UsageError: a bound is out of range.
    """

    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for option, value, largest in (("--max-kl", self.max_kl, math.inf), ("--min-agreement", self.min_agreement, 1)):
            if value is not None and not 0 <= value <= largest:
                expected = "0 to 1" if largest == 1 else "0 or more"
                raise UsageError(f"{option} is out of range", expected=expected, found=f"{value:g}")


def require_one_source(text: str | Path | None, token_ids: str | Path | None) -> None:
    """Refuse a request with no tokens, or with two sources of them.

    Raises:
        UsageError: neither text nor token ids are given, or both; or the name of the file is empty.
    """
    if (text is None) == (token_ids is None):
        raise UsageError(
            "Give either a text or token ids",
            expected="--text or --token-ids",
            found="neither" if text is None else "both",
        )
    for option, value in (("--text", text), ("--token-ids", token_ids)):
        if value is not None and not str(value):
            raise UsageError(f"{option} is empty", expected="a file to read")
