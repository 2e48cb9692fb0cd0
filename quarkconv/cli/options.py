"""Arguments and options of several commands."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Final

import typer

from quarkconv.errors import UsageError

_ADDRESS: Final = re.compile(r"auto|local|(ray://)?[\w.-]+:\d+|ray://.+")
_MAX_LAYER: Final = 100_000


def choice(option: str, *values: str, help: str) -> Any:  # noqa: A002
    """An option with one of some values, which the shell completes. The command checks the value."""
    return typer.Option(
        option,
        metavar="|".join(values),
        help=help,
        autocompletion=lambda incomplete: [value for value in values if value.startswith(incomplete)],
    )


Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        help="Directory, Hub repo id (org/name, org/name@revision), or s3://, gs://, az://, hf://buckets/, "
        "modelscope:// URL.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="[ADDRESS]", help="Run on a Ray cluster: auto, local, HOST:PORT. [default: auto]"),
]
"""The parser knows no optional values: :func:`with_addresses` fills in the address that was left out."""
Device = Annotated[str, choice("--device", "auto", "cpu", "cuda", help="Where to compute; cuda uses every GPU.")]
Report = Annotated[
    str | None, typer.Option("--report", metavar="FILE.html", help="Also write the result as one HTML file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def with_addresses(words: list[str]) -> list[str]:
    """The words of a command line, with ``auto`` behind each ``--ray`` that no address follows."""
    filled = []
    for word, following in pairwise([*words, ""]):
        filled.append(word)
        if word == "--ray" and not _ADDRESS.fullmatch(following):
            filled.append("auto")
    return filled


def parse_layers(text: str) -> list[int | str]:
    """Layers from ``0,3-5`` or ``thinker.model.layers.0.mlp,7``: numbers, ranges of numbers, and modules.

    Raises:
        UsageError: it is not such a list.
    """
    layers: list[int | str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None and re.fullmatch(r"\s*[A-Za-z_][\w.]*\s*", part):
            layers.append(part.strip())
            continue
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > _MAX_LAYER:
            raise UsageError(
                "Invalid --layers", expected="numbers, ranges such as 0,3-5, and modules", found=repr(text)
            )
        layers.extend(range(first, last + 1))
    return layers


def parse_layer_numbers(text: str) -> set[int]:
    """Layer numbers from ``0,3-5``.

    Raises:
        UsageError: it is not such a list.
    """
    invalid = UsageError("Invalid --layers", expected="numbers and ranges such as 0,3-5", found=repr(text))
    try:
        layers = parse_layers(text)
    except UsageError:
        raise invalid from None
    numbers = {layer for layer in layers if isinstance(layer, int)}
    if len(numbers) < len(set(layers)):
        raise invalid
    return numbers
