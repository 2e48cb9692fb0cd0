"""The output of the program: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from quarkconv.errors import QuarkconvError, SourceError

if TYPE_CHECKING:
    import logging

    from rich.console import Console, RenderableType
    from rich.padding import Padding
    from rich.text import Text

_LINES: Final = 25
_PLAIN: Final = {"✓": "+", "✗": "x", "–": "-", "·": "-", "→": ">", "∞": "inf"}
"""Replacements for marks that an encoding lacks: as question marks, right and wrong would look the same."""

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@cache
def console(stderr: bool = False) -> Console:
    """The terminal, created on first use because importing rich takes a while."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # main() turns it into the exit code

    # On a dumb terminal, rich ignores COLUMNS and uses 80 unless the height is given too.
    height = _LINES if os.environ.get("TERM", "").lower() in ("dumb", "unknown") else None
    return PipedConsole(stderr=stderr, highlight=False, soft_wrap=False, height=height)


def plain(error: UnicodeError) -> tuple[str, int]:
    """A handler of codec errors: replaces characters that the encoding of a terminal lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


class Output(NamedTuple):
    """The output of a command. Make one with :func:`open_output`.

    Attributes:
        json: print one JSON object instead of text for people.
        quiet: show no progress.
    """

    json: bool = False
    quiet: bool = False

    @property
    def shows_progress(self) -> bool:
        """Whether progress is shown: on a terminal, unless ``quiet``."""
        return not self.quiet and sys.stderr is not None and sys.stderr.isatty()

    def show(self, value: dict[str, Any], render: Callable[[], RenderableType]) -> None:
        """Print the result on stdout.

        Args:
            value: the result as JSON.
            render: draws it for people; not called in JSON mode, so that it may import what it needs.
        """
        if self.json:
            print_json(value)
        else:
            console().print(render(), crop=False)  # commands to copy are longer than lines


def open_output(*, json: bool = False, verbose: bool = False, quiet: bool = False) -> Output:
    """The output of a command; with ``verbose``, stderr also shows the library's log."""
    if verbose and not quiet:
        show_log()
    else:  # huggingface_hub logs each retry
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return Output(json, quiet)


def show_log() -> None:
    """Show the library's log on stderr, one line a message, and what huggingface_hub logs, without signatures."""
    import logging

    class TerminalHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console(stderr=True).print(printable(record.getMessage()), style="dim", markup=False, soft_wrap=True)

    log = logging.getLogger("quarkconv")
    log.setLevel(logging.INFO)
    log.handlers = [TerminalHandler()]
    logging.setLogRecordFactory(_record_without_queries)


def _record_without_queries(*args: Any, **more: Any) -> logging.LogRecord:
    """A record of a log; of huggingface_hub's, URLs lose their queries, since signed ones work like passwords."""
    import logging

    record = logging.LogRecord(*args, **more)
    if record.name.startswith("huggingface_hub"):
        record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
    return record


def print_json(value: dict[str, Any]) -> None:
    """Print the JSON object of ``--json``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise BrokenPipeError from None  # without errno: Typer exits with 1 on EPIPE, which means a finding


def show_error(error: QuarkconvError, *, as_json: bool) -> None:
    """Print a known error and its details on stderr; with ``--json`` also as an object on stdout."""
    if as_json:
        details = dict(error.details())
        about = {
            "error": error.message,
            "exit_code": error.exit_code,
            "code": error.code if isinstance(error, SourceError) else None,
        }
        print_json({"schema": "quarkconv.error/1", **about, **details})
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), (printable(error.message), "bold"))
    for label, detail in error.details():
        text.append(f"\n  {label + ':':<10}", style="green" if label == "hint" else "dim")
        text.append(printable(detail))
    console(stderr=True).print(text, soft_wrap=True)


def printable(text: str) -> str:
    """Text with control characters escaped, so that a name in a file cannot control the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def indented(text: RenderableType, by: int, style: str = "") -> Padding:
    """Text or a table, indented by a number of columns, including lines that are wrapped."""
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text, style=style) if isinstance(text, str) else text, (0, 0, 0, by))


def whole_line(text: str) -> Text:
    """A line to copy, which is not wrapped."""
    from rich.text import Text

    return Text(printable(text), no_wrap=True, overflow="ignore")


def title(name: str, facts: list[str]) -> Text:
    """The subject of the output, and a line of facts about it."""
    from rich.text import Text

    return Text.assemble((printable(name), "bold"), "\n", (printable("  ·  ".join(facts)), "dim"))


def verdict(text: str, *, good: bool) -> Text:
    """A closing line with a mark."""
    from rich.text import Text

    return Text.assemble(("✓ " if good else "✗ ", "bold green" if good else "bold red"), (text, "bold"))
