"""The program ``quarkconv``: known errors shown once, exit codes of the contract."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import warnings
from contextlib import suppress
from io import TextIOWrapper
from typing import Final, NoReturn

from quarkconv.cli.failures import explained, see_help
from quarkconv.cli.out import plain, show_error
from quarkconv.errors import InterruptedByUser, QuarkconvError, UsageError

_PLAIN: Final = "quarkconv.plain"
"""Name of the error handler for characters that a terminal cannot show."""
BROKEN_PIPE: Final = 128 + 13
"""Exit code of a program that is ended by SIGPIPE."""
_RETRY_SECONDS: Final = 0.05


def main(args: list[str] | None = None) -> NoReturn:
    """Run the program and exit with its code; known errors are printed without a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background of a script
        signal.signal(signal.SIGINT, _interrupt)
    words = sys.argv[1:] if args is None else args
    as_json = "--json" in words
    try:
        from quarkconv.cli.program import run_command  # imports Typer, which is faster once run() has called gc.disable

        status = run_command(words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except QuarkconvError as error:
        if _interrupt_waits():
            _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
        if isinstance(error, UsageError) and error.hint is None:
            error.hint = see_help(_command(words))
        _exit_with(error, as_json=as_json)
    except BrokenPipeError:  # the reader, such as `head`, has exited
        sys.exit(BROKEN_PIPE)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # Typer's parser, which prints the text of --help
            sys.exit(BROKEN_PIPE)
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = explained(error, _command(words))
        if failure is None:
            raise
        _exit_with(failure, as_json=as_json and not isinstance(error, OSError))  # of standard output itself
    if status == InterruptedByUser.exit_code:  # Typer turns a KeyboardInterrupt into this code, or into an Abort
        _exit_with(InterruptedByUser("Interrupted"), as_json=as_json)
    sys.exit(status if isinstance(status, int) else 0)


def run() -> NoReturn:
    """The installed program: :func:`main` in its own process.

    The headers of a large checkpoint are half a million small objects. Garbage collection, and freeing each object
    before the process ends, would take longer than reading the headers.
    """
    gc.disable()
    # torch's OpenMP reads this when it is loaded. Its threads otherwise spin for milliseconds after each product: half
    # to two thirds of the processor time of `verify` on 2 cores, of small and large experts, and nothing gets faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


def _command(words: list[str]) -> str:
    """The program and its command, where the command line begins with one."""
    from quarkconv.cli.program import COMMANDS

    return f"quarkconv {words[0]}" if words and words[0] in COMMANDS else "quarkconv"


def _exit_with(error: QuarkconvError, *, as_json: bool) -> NoReturn:
    show_error(error, as_json=as_json)
    sys.exit(error.exit_code)


def _interrupt(signum: int, frame: object) -> None:  # noqa: ARG001
    """Raise KeyboardInterrupt; while torch is imported, a moment later.

    Its extension takes an exception from the import of numpy for a missing numpy, and the command would go on; one in
    other places aborts the process.
    """
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise KeyboardInterrupt


def _interrupt_waits() -> bool:
    """Whether :func:`_interrupt` has yet to raise: the import ended, and the command with it, within that moment."""
    return signal.getsignal(signal.SIGALRM) is _interrupt and signal.getitimer(signal.ITIMER_REAL)[0] > 0
