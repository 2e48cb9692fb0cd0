"""The commands of the program and the options before them, as Typer's parser takes them."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Final

import typer

from quarkconv.cli.options import with_addresses
from quarkconv.version import own_version

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


def run_command(words: list[str]) -> Any:
    """Run a command line, and return the exit code, or None.

    Only the command that it begins with is imported; any other command line needs all of them. Importing every command,
    and building its options, would take more time than a small `inspect`.
    """
    app = typer.Typer(
        name="quarkconv",
        help="Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    named = words[0] if words else ""
    for name in [named] if named in COMMANDS else COMMANDS:
        module = import_module(f"quarkconv.cli.{name}")
        app.command(name, short_help=COMMANDS[name])(getattr(module, name))
    return app(with_addresses(words) or ["--help"], standalone_mode=False)


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
