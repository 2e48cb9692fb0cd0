"""Errors of carrying a plan out that several modules raise."""

from __future__ import annotations

from quarkconv.errors import SourceError

START_OVER = "when no process writes to the source, start over with --overwrite"


def source_changed(file: str, expected: str, found: str, hint: str = START_OVER) -> SourceError:
    """A source file is not what it was when the conversion began."""
    message = "A source file changed during the conversion"
    return SourceError(message, code="source-changed", file=file, expected=expected, found=found, hint=hint)


def not_as_planned(file: str, expected: str, found: str, tensor: str | None = None) -> SourceError:
    """The error of a source file that changed since the conversion was planned."""
    return SourceError(
        "The source differs from the planned one",
        code="source-changed",
        file=file,
        tensor=tensor,
        expected=expected,
        found=found,
        hint="plan the conversion again",
    )
