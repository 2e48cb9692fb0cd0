"""The errors of quarkconv, and the exit code that each one gives.

    QuarkconvError
    ├── UsageError          2    the command line or the arguments make no sense
    ├── SourceError         3    the source is missing, malformed, truncated or inconsistent
    │   └── HubError        3    the Hub does not give it
    ├── UnsupportedError    4    the source is readable, but no target can represent it
    ├── WriteError          5    writing failed; what was finished is kept, the same command resumes
    └── InterruptedByUser   130  stopped by a signal; what was finished is kept

Every error says which file and which tensor or module it is about, what was expected, what was found and
what to do next. The parts are kept apart, so that the terminal and ``--json`` can show them each in their way.
"""

from __future__ import annotations

from typing import ClassVar


class QuarkconvError(Exception):
    """A failure that is known, explained and has an exit code.

    Args:
        message: one sentence, without a full stop at the end.
        file: path of the file concerned.
        tensor: name of the tensor or module concerned.
        expected: what should have been there.
        found: what was there.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.hint = hint

    def details(self) -> list[tuple[str, str]]:
        """The parts that are known, as (label, text), in the order in which people read them."""
        parts = [
            ("file", self.file),
            ("tensor", self.tensor),
            ("expected", self.expected),
            ("found", self.found),
            ("hint", self.hint),
        ]
        return [(label, text) for label, text in parts if text is not None]

    def __str__(self) -> str:
        return "; ".join([self.message, *(f"{label}: {text}" for label, text in self.details())])


class UsageError(QuarkconvError):
    """The command line or the arguments make no sense; nothing was read or written."""

    exit_code = 2


class SourceError(QuarkconvError):
    """The source cannot be read: missing, malformed, truncated or inconsistent.

    ``code`` is the finding code (see :mod:`quarkconv.findings`) under which ``inspect`` reports the same defect, where
    it can go on; ``conversion-unfinished``, ``hub-unavailable``, ``manifest-invalid``, ``plan-invalid``,
    ``source-changed`` and ``store-unavailable`` are codes of errors alone.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        code: str,
        file: str | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, file=file, tensor=tensor, expected=expected, found=found, hint=hint)
        self.code = code


class HubError(SourceError):
    """The Hub does not give what was asked for: no such repo, no access, no network, or an answer that is none."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, code="hub-unavailable", file=file, expected=expected, found=found, hint=hint)


class UnsupportedError(QuarkconvError):
    """The source was read, but it is not INT8 or the target cannot represent it; nothing was written."""

    exit_code = 4


class WriteError(QuarkconvError):
    """Writing failed: no space, no permission, I/O. What was finished is kept, the same command resumes."""

    exit_code = 5


class InterruptedByUser(QuarkconvError):  # noqa: N818 - an interrupt is no error
    """Stopped by SIGINT or SIGTERM. What was finished is kept, the same command resumes."""

    exit_code = 130
