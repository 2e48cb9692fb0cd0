"""The program ``quarkconv``: one command a file, known errors shown once, exit codes of the contract."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import warnings
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, Any, Final, NoReturn

import typer

from quarkconv.cli import convert, engines, evaluate, inspect, verify
from quarkconv.cli.out import plain, show_error
from quarkconv.errors import InterruptedByUser, QuarkconvError, UsageError, WriteError

_PLAIN: Final = "quarkconv.plain"
"""Name of the handler for characters that a terminal cannot show."""
BROKEN_PIPE: Final = 128 + 13
"""Exit code of a program that SIGPIPE ends."""

app = typer.Typer(
    name="quarkconv",
    help="Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
app.command("evaluate")(evaluate.evaluate)
app.command("engines")(engines.engines)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"quarkconv {version('quarkconv')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the program and exit with the code of the contract; a known error never shows a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    words = sys.argv[1:] if args is None else args
    as_json = "--json" in words
    try:
        status: Any = app(words or ["--help"], standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except QuarkconvError as error:
        _exit_with(error, as_json=as_json)
    except KeyboardInterrupt:
        _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
    except BrokenPipeError:  # the reader, such as `head`, has gone
        sys.exit(BROKEN_PIPE)
    except OSError as error:  # what reads and writes files has errors of its own: this is standard output
        _exit_with(WriteError("Standard output cannot be written", found=error.strerror), as_json=False)
    except Exception as error:
        # Usage errors of the parser, which Typer brings along: they format themselves and carry their exit code.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            hint = "run `quarkconv --help`, or `quarkconv COMMAND --help`"
            _exit_with(UsageError(error.format_message().rstrip("."), hint=hint), as_json=as_json)
        if type(error).__name__ == "Abort":
            _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
        raise
    if status == InterruptedByUser.exit_code:  # Typer turns a KeyboardInterrupt into this, or into an Abort
        _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
    sys.exit(status if isinstance(status, int) else 0)


def run() -> NoReturn:
    """The program as it is installed: :func:`main` in a process of its own.

    The headers of a large checkpoint are half a million small objects, none of them garbage. Collecting it, and giving
    every object back before the process ends, would take longer than reading the headers did.
    """
    gc.disable()
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch does without it, and so do we
    codecs.register_error(_PLAIN, plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)
    try:
        main()
    except SystemExit as stop:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # closed, gone or full: said already, or nobody is there to read
                stream.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)


def _exit_with(error: QuarkconvError, *, as_json: bool) -> NoReturn:
    show_error(error, as_json=as_json)
    sys.exit(error.exit_code)


def _terminate(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt
