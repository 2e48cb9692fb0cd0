"""Where output goes: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from quarkconv.errors import QuarkconvError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

_LINES: Final = 25
_PLAIN: Final = {"✓": "+", "✗": "x", "–": "-", "·": "-", "→": ">", "∞": "inf"}
"""Stand-ins for the marks that say whether something is right: as question marks they would all say the same."""

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@cache
def console(stderr: bool = False) -> Console:
    """The terminal as rich sees it; made when first needed, since rich takes a while to import."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # the program ends in one place, and there with one exit code

    # rich gives a dumb terminal 80 columns, whatever COLUMNS says, unless the height is known too.
    height = _LINES if os.environ.get("TERM", "").lower() in ("dumb", "unknown") else None
    return PipedConsole(stderr=stderr, highlight=False, soft_wrap=False, height=height)


def plain(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that the encoding of a terminal does not have; a handler of codec errors."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


def show_log() -> None:
    """Show on stderr what the library logs, one line a message."""
    import logging

    class TerminalHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console(stderr=True).print(printable(record.getMessage()), style="dim", markup=False, soft_wrap=True)

    log = logging.getLogger("quarkconv")
    log.setLevel(logging.INFO)
    log.handlers = [TerminalHandler()]


_quiet = False


def set_talk(*, verbose: bool, quiet: bool) -> None:
    """How much is said on stderr beside errors: with ``quiet`` nothing, with ``verbose`` what the library logs."""
    global _quiet
    _quiet = quiet
    if verbose and not quiet:
        show_log()
    else:  # huggingface_hub tells of each request that it makes again, with addresses that are as good as passwords
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def talkative() -> bool:
    """Whether progress is shown: on a terminal, unless it was asked to be quiet."""
    return not _quiet and sys.stderr is not None and sys.stderr.isatty()


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of ``--json``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise BrokenPipeError from None  # without a number: Typer would exit 1 for EPIPE, which means a finding


def show_error(error: QuarkconvError, *, as_json: bool) -> None:
    """A known error: one message, then what is known about it, on stderr; with ``--json`` an object on stdout too."""
    if as_json:
        details = dict(error.details())
        about = {"error": error.message, "exit_code": error.exit_code, "code": getattr(error, "code", None)}
        print_json({"schema": "quarkconv.error/1", **about, **details})
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), (printable(error.message), "bold"))
    for label, detail in error.details():
        text.append(f"\n  {label + ':':<10}", style="green" if label == "hint" else "dim")
        text.append(printable(detail))
    console(stderr=True).print(text, soft_wrap=True)


def printable(text: str) -> str:
    """Text from a file with control characters escaped, so that a name cannot drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def indented(text: str | Text, by: int, style: str = "") -> Padding:
    """Text whose lines all start ``by`` columns in, also those that are wrapped."""
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text, style=style) if isinstance(text, str) else text, (0, 0, 0, by))


def title(name: str, facts: list[str]) -> Text:
    """The subject of the output, and a line of facts about it."""
    from rich.text import Text

    return Text.assemble((printable(name), "bold"), "\n", (printable("  ·  ".join(facts)), "dim"))


def verdict(text: str, *, good: bool) -> Text:
    """A closing line with a mark."""
    from rich.text import Text

    return Text.assemble(("✓ " if good else "✗ ", "bold green" if good else "bold red"), (text, "bold"))
