"""Exceptions that no command raises on purpose, as errors with an exit code: of the system, of Python, of Typer."""

from __future__ import annotations

import os
from typing import Final

from quarkconv.errors import InterruptedByUser, QuarkconvError, UsageError, WriteError

_ALLOCATION: Final = ("can't allocate memory", "not enough memory")
"""Words of torch's RuntimeError where the host has no more memory."""


def explained(error: BaseException, command: str) -> QuarkconvError | None:
    """The error for an exception; None for a fault of the program, whose traceback is needed.

    Args:
        error: the exception.
        command: the command, for the hint of wrong usage: ``quarkconv inspect``.
    """
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # wrong usage, by Typer's parser
        return UsageError(error.format_message().rstrip("."), hint=see_help(command))
    if type(error).__name__ == "Abort" or _follows_interrupt(error):
        return InterruptedByUser("Interrupted")
    if isinstance(error, OSError):
        return _of_a_file(error)
    if isinstance(error, ImportError) and not (error.name or "").startswith("quarkconv"):
        return UsageError(
            "A package that quarkconv needs cannot be imported",
            file=error.path,
            found=error.msg,
            hint="reinstall it; `pip check` lists conflicting versions",
        )
    if _out_of_memory(error):
        return UsageError(
            "Out of memory",
            found=str(error).partition("\n")[0][:300] or None,
            hint="close other programs, or give fewer --tokens, a smaller --batch, or --device cpu",
        )
    return None


def _of_a_file(error: OSError) -> QuarkconvError:
    """The error of a file that no command explained: mostly of standard output, which has no name."""
    if error.filename is not None:
        return WriteError(
            "A file cannot be read or written",
            file=str(error.filename),
            found=error.strerror,
            hint="check its permissions and the free space, then run the command again",
        )
    try:
        os.getcwd()
    except OSError:
        return UsageError("The current directory does not exist", hint="change to a directory that exists")
    return WriteError(
        "Standard output cannot be written",
        found=error.strerror,
        hint="free space there, or write to another file",
    )


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a GPU was too small. torch is not imported to know its class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION)


def _follows_interrupt(error: BaseException) -> bool:
    """Whether an interrupt led to an error: Python wraps one that hits a class statement, such as those of torch."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, KeyboardInterrupt):
        chain = chain.__cause__ or chain.__context__
    return chain is not None


def see_help(command: str) -> str:
    """The next step where a command line is invalid and nothing better is known."""
    return f"run `{command} --help`"
