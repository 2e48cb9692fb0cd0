"""The program ``quarkconv``: one command a file, known errors shown once, exit codes of the contract."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, Final, NoReturn

import typer

from quarkconv.cli.options import with_addresses
from quarkconv.cli.out import plain, show_error
from quarkconv.errors import InterruptedByUser, QuarkconvError, UsageError, WriteError
from quarkconv.version import own_version

_PLAIN: Final = "quarkconv.plain"
"""Name of the error handler for characters that a terminal cannot show."""
BROKEN_PIPE: Final = 128 + 13
"""Exit code of a program that is ended by SIGPIPE."""

COMMANDS: Final = {
    "inspect": "Show contents, contradictions and engines.",
    "convert": "Rewrite a checkpoint for an engine.",
    "verify": "Prove structure, bytes and numbers.",
    "evaluate": "Compare outputs with the unquantized model.",
    "tune": "Measure launch options on this GPU.",
    "merge": "Merge the results of verify --part.",
    "uploads": "List or discard unfinished uploads.",
    "engines": "List engines and what they support.",
}
"""Command -> its line in the list of commands, which cuts longer texts. Each is a function in a module of its name."""


def program(words: list[str]) -> typer.Typer:
    """The program, with the command that a command line begins with; any other command line needs all of them.

    Importing every command, and building its options, would take more time than a small `inspect`.
    """
    app = typer.Typer(
        name="quarkconv",
        help="Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    named = words[0] if words else ""
    for name in [named] if named in COMMANDS else COMMANDS:
        module = import_module(f"quarkconv.cli.{name}")
        app.command(name, short_help=COMMANDS[name])(getattr(module, name))
    return app


def _version(value: bool) -> None:
    if value:
        typer.echo(f"quarkconv {own_version()}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the program and exit with its code; known errors are printed without a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    words = sys.argv[1:] if args is None else args
    as_json = "--json" in words
    try:
        status: Any = program(words)(with_addresses(words) or ["--help"], standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except QuarkconvError as error:
        _exit_with(error, as_json=as_json)
    except KeyboardInterrupt:
        _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
    except BrokenPipeError:  # the reader, such as `head`, has exited
        sys.exit(BROKEN_PIPE)
    except OSError as error:  # errors of files are QuarkconvErrors: this is standard output
        _exit_with(WriteError("Standard output cannot be written", found=error.strerror), as_json=False)
    except Exception as error:
        # Usage errors of Typer's parser format themselves and carry an exit code.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            hint = "run `quarkconv --help`, or `quarkconv COMMAND --help`"
            _exit_with(UsageError(error.format_message().rstrip("."), hint=hint), as_json=as_json)
        if type(error).__name__ == "Abort":
            _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
        raise
    if status == InterruptedByUser.exit_code:  # Typer turns a KeyboardInterrupt into this code, or into an Abort
        _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
    sys.exit(status if isinstance(status, int) else 0)


def run() -> NoReturn:
    """The installed program: :func:`main` in its own process.

    The headers of a large checkpoint are half a million small objects. Garbage collection, and freeing each object
    before the process ends, would take longer than reading the headers.
    """
    gc.disable()
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch does not need it here
    codecs.register_error(_PLAIN, plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)
    try:
        main()
    except SystemExit as stop:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # closed or full: reported already, or there is no reader
                stream.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)


def _exit_with(error: QuarkconvError, *, as_json: bool) -> NoReturn:
    show_error(error, as_json=as_json)
    sys.exit(error.exit_code)


def _terminate(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt
