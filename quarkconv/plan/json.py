"""Pieces as JSON, and back, for plans and manifests.

A piece is a row that starts with the name of its class. File names are written once and referred to by number, since a
large plan has 100,000 pieces.

    ["copy", tensor, number in sources, start, nbytes]
    ["rows", tensor, number in sources, start, nbytes, widen, repeat]
    ["weights", tensor, number in sources, start, nbytes, SCALE]        SCALE: a row of "copy" or "rows"
    ["columns", tensor, number in sources, start, nbytes, run, stride]
    ["codes", tensor, number in sources, start, nbytes, dtype, columns]
    ["code-columns", tensor, number in sources, start, nbytes, dtype, columns, first, count]
    ["row-scales", tensor, number in sources, start, nbytes, dtype, columns]
    ["zeros", tensor, number in sources, start, nbytes, length]         nothing is read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quarkconv.dtypes import DTYPE_BITS, QUANTIZABLE
from quarkconv.plan.fields import count, text
from quarkconv.plan.pieces import (
    CodeColumns,
    Codes,
    Columns,
    Copy,
    MoEGeometry,
    Piece,
    Rows,
    RowScales,
    SourceFile,
    Weights,
    Zeros,
)

_F32: Final = 4


def piece_to_json(piece: Piece, number: Mapping[str, int]) -> list[Any]:
    """The row of a piece.

    Args:
        piece: the piece.
        number: source file -> its number.
    """
    match piece:
        case Copy(tensor, file, start, nbytes):
            return ["copy", tensor, number[file], start, nbytes]
        case Rows((tensor, file, start, nbytes), widen, repeat):
            return ["rows", tensor, number[file], start, nbytes, widen, repeat]
        case Weights((tensor, file, start, nbytes), scale):
            return ["weights", tensor, number[file], start, nbytes, piece_to_json(scale, number)]
        case Columns((tensor, file, start, nbytes), run, stride):
            return ["columns", tensor, number[file], start, nbytes, run, stride]
        case Codes((tensor, file, start, nbytes), dtype, columns):
            return ["codes", tensor, number[file], start, nbytes, dtype, columns]
        case CodeColumns(((tensor, file, start, nbytes), dtype, columns), first, some):
            return ["code-columns", tensor, number[file], start, nbytes, dtype, columns, first, some]
        case RowScales((tensor, file, start, nbytes), dtype, columns):
            return ["row-scales", tensor, number[file], start, nbytes, dtype, columns]
        case Zeros((tensor, file, start, nbytes), length):
            return ["zeros", tensor, number[file], start, nbytes, length]


def piece_from_json(row: object, sources: Sequence[SourceFile]) -> Piece:
    """The piece of a row.

    Args:
        row: as :func:`piece_to_json` writes it.
        sources: the source files, in the order of their numbers.

    Raises:
        TypeError, ValueError, IndexError: it is not such a row, or its sizes do not fit together.
    """
    if not isinstance(row, list):
        raise TypeError(f"expected the row of a piece, found {row!r:.40}")
    kind, tensor, file, start, nbytes, *rest = row
    source = Copy(text(tensor), sources[count(file)].name, count(start), count(nbytes))
    match kind, rest:
        case "copy", []:
            return source
        case "rows", ["" | "BF16" | "F16" as widen, repeat]:
            if not widen and repeat == 1:
                raise ValueError("rows that are a copy")
            return Rows(source, widen, count(repeat))
        case "weights", [scale_row]:
            scale = piece_from_json(scale_row, sources)
            if isinstance(scale, Copy | Rows) and _divides(scale.output_nbytes, source.nbytes):
                return Weights(source, scale)
        case "columns", [run, stride]:
            if 0 < count(run) <= count(stride) and source.nbytes >= run and (source.nbytes - run) % stride == 0:
                return Columns(source, run, stride)
        case "codes" | "row-scales", [dtype, columns]:
            return (Codes if kind == "codes" else RowScales)(*_float_rows(source, dtype, columns))
        case "code-columns", [dtype, columns, first, some]:
            if 0 < count(some) <= count(columns) - count(first):
                return CodeColumns(Codes(*_float_rows(source, dtype, columns)), first, some)
        case "zeros", [length]:
            return Zeros(source, count(length))
    raise ValueError(f"not a piece, or a piece with inconsistent sizes: {kind!r:.40}")


def _float_rows(source: Copy, dtype: object, columns: object) -> tuple[Copy, str, int]:
    """The fields of a piece of rows of a float weight, checked."""
    number = count(columns)
    row = number * DTYPE_BITS[text(dtype)] // 8 if dtype in QUANTIZABLE else 0
    if not row or source.nbytes % row:
        raise ValueError(f"not rows of a float weight: {dtype!r:.20}, {number} columns, {source.nbytes} bytes")
    return source, text(dtype), number


def _divides(scale_nbytes: int, codes: int) -> bool:
    """Whether codes are rows of one length, with an F32 scale for each row."""
    rows, rest = divmod(scale_nbytes, _F32)
    return not rest and (codes % rows == 0 if rows else codes == 0)


def moe_from_json(value: dict[str, Any] | None) -> MoEGeometry | None:
    """The geometry of the experts, of which :func:`dataclasses.asdict` gives the JSON; None for null.

    Raises:
        KeyError, TypeError: it is malformed.
    """
    if value is None:
        return None
    top_k, activation = value["top_k"], value["activation_function"]
    return MoEGeometry(
        layers=tuple(map(count, value["layers"])),
        prefixes=tuple(map(text, value["prefixes"])),
        experts=count(value["experts"]),
        top_k=None if top_k is None else count(top_k),
        hidden_size=count(value["hidden_size"]),
        intermediate_size=count(value["intermediate_size"]),
        activation_function=None if activation is None else text(activation),
    )
