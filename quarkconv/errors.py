"""The errors of quarkconv, and the exit code that each one gives.

    QuarkconvError
    ├── UsageError          2    invalid command line or arguments
    ├── SourceError         3    the source is missing, malformed, truncated or inconsistent
    │   └── HubError        3    the Hub, or ModelScope, does not provide it
    ├── UnsupportedError    4    the source is readable, but quarkconv or the target cannot handle it
    ├── WriteError          5    writing failed; finished work is kept, the same command resumes
    └── InterruptedByUser   130  stopped by a signal; finished work is kept, the same command resumes

Every error names the file, the tensor or module, what was expected, what was found, and the next step. The parts are
separate, for the terminal and for ``--json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, TypedDict, Unpack

COPY_AGAIN: Final = "download or copy the file again"
"""The next step where a file is damaged."""


class Details(TypedDict, total=False):
    """The parts of an error beside its message.

    Attributes:
        file: path of the file concerned.
        tensor: name of the tensor or module concerned.
        expected: what the format, the command or another file requires.
        found: what the file or the command line holds.
        hint: the next step.
    """

    file: str | None
    tensor: str | None
    expected: str | None
    found: str | None
    hint: str | None


class QuarkconvError(Exception):
    """An expected failure, with an explanation and an exit code.

    Args:
        message: one sentence, without a full stop at the end.
        details: see :class:`Details`.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **details: Unpack[Details]) -> None:
        super().__init__(message)
        self.message = message
        self.file = details.get("file")
        self.tensor = details.get("tensor")
        self.expected = details.get("expected")
        self.found = details.get("found")
        self.hint = details.get("hint")

    def __reduce__(self) -> tuple[Any, ...]:
        """Whatever the arguments of a subclass, its errors cross processes with all their parts."""
        return _restored, (type(self), self.args, self.__dict__)

    def details(self) -> list[tuple[str, str]]:
        """The parts that are known, as (label, text), in reading order."""
        parts = [(label, getattr(self, label)) for label in Details.__annotations__]
        return [(label, text) for label, text in parts if text is not None]

    def __str__(self) -> str:
        return "; ".join([self.message, *(f"{label}: {text}" for label, text in self.details())])


def _restored(kind: type[QuarkconvError], args: tuple[Any, ...], parts: dict[str, Any]) -> QuarkconvError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(parts)
    return error


class UsageError(QuarkconvError):
    """Invalid command line or arguments; nothing was written."""

    exit_code = 2


class SourceError(QuarkconvError):
    """The source cannot be read: missing, malformed, truncated or inconsistent.

    ``code`` is the finding code (see :mod:`quarkconv.findings`) under which ``inspect`` reports the same defect;
    ``conversion-unfinished``, ``hub-unavailable``, ``manifest-invalid``, ``plan-invalid``, ``source-changed``,
    ``store-unavailable`` and ``tensor-not-finite`` are codes of errors alone.
    """

    exit_code = 3

    def __init__(self, message: str, *, code: str, **details: Unpack[Details]) -> None:
        super().__init__(message, **details)
        self.code = code


class HubError(SourceError):
    """The Hub, or ModelScope, does not provide the model: no such repo, no access, no network, an invalid response."""

    def __init__(self, message: str, **details: Unpack[Details]) -> None:
        super().__init__(message, code="hub-unavailable", **details)


class UnsupportedError(QuarkconvError):
    """The source is readable, but it is not INT8, or the target cannot represent it; nothing was written."""

    exit_code = 4


class WriteError(QuarkconvError):
    """Writing failed: no space, no permission, I/O. Finished work is kept; the same command resumes."""

    exit_code = 5


class InterruptedByUser(QuarkconvError):  # noqa: N818 - an interrupt is not an error
    """Stopped by SIGINT or SIGTERM. Finished work is kept; the same command resumes."""

    exit_code = 130


def interrupted() -> InterruptedByUser:
    """The error of work that was stopped; what it finished is kept."""
    return InterruptedByUser(
        "Interrupted; finished work is kept", hint="run the same command again: it resumes where it stopped"
    )


@contextmanager
def naming_files_in(root: Path | str) -> Iterator[None]:
    """Let errors about files of a checkpoint name them by their path, where they have the name inside of ``root``."""
    try:
        yield
    except (SourceError, UnsupportedError) as error:
        named = error.file is None or error.file == str(root) or error.file.startswith((f"{root}/", "/"))
        if not named and "://" not in str(error.file):
            error.file = f"{root}/{error.file}"
        raise
