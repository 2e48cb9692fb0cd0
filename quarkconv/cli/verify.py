"""``quarkconv verify``."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkconv.cli.console import byte_progress, console, print_json, size
from quarkconv.cli.options import Json, Model
from quarkconv.errors import UsageError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable

    from quarkconv.verify.results import LayerNumbers

_MAX_LAYER = 100_000


def verify(
    model: Model = ".",
    source: Annotated[
        str | None, typer.Option("--source", metavar="DIR", help="What it was converted from; compared byte by byte.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where numbers are computed.")
    ] = "auto",
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="0,3-5", help="MoE layers whose numbers are checked. [default: all]"),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Random tokens for each layer.")] = 64,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the random tokens.")] = 0,
    json: Json = False,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.html", help="Also write the result as one HTML file.")
    ] = None,
) -> int:
    """Prove a checkpoint: its structure, every byte, and the numbers of the INT8 forward.

    Takes a converted checkpoint or a Quark export as it came. Exit code 1 when anything is wrong.
    """
    wanted = None if layers is None else parse_layers(layers)
    from quarkconv.verify.verify import verify_checkpoint

    with ExitStack() as stack:
        watcher = _Watcher(stack)
        verification = verify_checkpoint(
            model, source, device, layers=wanted, tokens=tokens, seed=seed, watcher=watcher
        )  # fmt: skip
    if report is not None:
        from quarkconv.cli.render_verification import to_html

        _write_report(report, to_html(verification))
    if json:
        print_json(verification.to_json())
    else:
        from quarkconv.cli.render_verification import render_verification

        console().print(render_verification(verification))
    return 0 if verification.ok else 1


def parse_layers(text: str) -> set[int]:
    """Layer numbers from ``0,3-5``.

    Raises:
        UsageError: it is not such a list.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > _MAX_LAYER:
            raise UsageError("These are no layers", expected="numbers and ranges such as 0,3-5", found=repr(text))
        numbers.update(range(first, last + 1))
    return numbers


class _Watcher:
    """Shows the bytes as a bar and each layer as a line, on stderr, in a terminal."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._bar = stack.enter_context(ExitStack())
        self._advance: Callable[[int], None] = lambda _: None

    def total_bytes(self, total: int) -> None:
        self._advance = self._bar.enter_context(byte_progress(f"Checking {size(total)}", total))

    def checked(self, nbytes: int) -> None:
        self._advance(nbytes)

    def layer(self, numbers: LayerNumbers) -> None:
        self._bar.close()
        terminal = console(stderr=True)
        if terminal.is_terminal:
            outcome: Any = "ok" if numbers.ok else "differs"
            terminal.print(f"layer {numbers.layer}: {outcome} in {numbers.seconds:.1f} s", style="dim")


def _write_report(name: str, html: str) -> None:
    try:
        Path(name).write_text(html, encoding="utf-8")
    except OSError as error:
        raise WriteError("The report cannot be written", file=name, found=error.strerror or str(error)) from error
