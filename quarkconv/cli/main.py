"""The program ``quarkconv``: one command a file, known errors shown once, exit codes of the contract."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from quarkconv.cli import convert, engines, inspect, verify
from quarkconv.cli.console import show_error
from quarkconv.errors import InterruptedByUser, QuarkconvError, UsageError

app = typer.Typer(
    name="quarkconv",
    help="Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
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
    as_json = "--json" in (sys.argv[1:] if args is None else args)
    try:
        status: Any = app(args, standalone_mode=False)
    except QuarkconvError as error:
        show_error(error, as_json=as_json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _exit_interrupted(as_json=as_json)
    except BrokenPipeError:  # the reader, such as `head`, has gone
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        # Usage errors of the parser, which Typer brings along: they format themselves and carry their exit code.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            hint = "run `quarkconv --help`, or `quarkconv COMMAND --help`"
            show_error(UsageError(error.format_message().rstrip("."), hint=hint), as_json=as_json)
            sys.exit(UsageError.exit_code)
        if type(error).__name__ == "Abort":
            _exit_interrupted(as_json=as_json)
        raise
    if status == InterruptedByUser.exit_code:  # Typer turns a KeyboardInterrupt into this, or into an Abort
        _exit_interrupted(as_json=as_json)
    sys.exit(status if isinstance(status, int) else 0)


def run() -> NoReturn:
    """The program as it is installed: :func:`main` in a process of its own.

    The headers of a large checkpoint are half a million small objects, none of them garbage. Collecting it, and giving
    every object back before the process ends, would take longer than reading the headers did.
    """
    gc.disable()
    try:
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)


def _exit_interrupted(*, as_json: bool) -> NoReturn:
    show_error(InterruptedByUser("Interrupted"), as_json=as_json)
    sys.exit(InterruptedByUser.exit_code)


def _terminate(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt
