"""Pieces and plans as JSON, and back. The manifest writes its pieces with the same codec.

A piece is a row that starts with the name of its class. File names are written once and referred to by number, since a
large plan has 100,000 pieces.

    ["copy", tensor, number in sources, start, nbytes]
    ["rows", tensor, number in sources, start, nbytes, widen, repeat]
    ["weights", tensor, number in sources, start, nbytes, SCALE]        SCALE: a row of "copy" or "rows"
    ["columns", tensor, number in sources, start, nbytes, run, stride]
    ["codes", tensor, number in sources, start, nbytes, dtype, columns]
    ["row-scales", tensor, number in sources, start, nbytes, dtype, columns]
    ["zeros", tensor, number in sources, start, nbytes, length]         nothing is read
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Literal

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.errors import SourceError
from quarkconv.experts.ranks import make_rank
from quarkconv.findings import Finding, Severity
from quarkconv.plan.fields import count, file_name, text
from quarkconv.plan.pieces import (
    PLAN_FORMAT,
    Check,
    Codes,
    Columns,
    Copy,
    MoEGeometry,
    OutputShard,
    OutputTensor,
    Piece,
    Plan,
    Rows,
    RowScales,
    SourceFile,
    TextFile,
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
        case "codes" | "row-scales", ["BF16" | "F16" | "F32" as dtype, columns]:
            row = count(columns) * DTYPE_BITS[dtype] // 8
            if row and source.nbytes % row == 0:
                return (Codes if kind == "codes" else RowScales)(source, dtype, columns)
        case "zeros", [length]:
            return Zeros(source, count(length))
    raise ValueError(f"not a piece, or one whose sizes do not fit together: {kind!r:.40}")


def _divides(scale_nbytes: int, codes: int) -> bool:
    """Whether codes are rows of one length, with an F32 scale for each row."""
    rows, rest = divmod(scale_nbytes, _F32)
    return not rest and (codes % rows == 0 if rows else codes == 0)


def moe_from_json(value: dict[str, Any]) -> MoEGeometry:
    """The geometry of the experts, of which :func:`dataclasses.asdict` gives the JSON.

    Raises:
        KeyError, TypeError: it is malformed.
    """
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


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as an object of JSON values."""
    number = {source.name: position for position, source in enumerate(plan.sources)}
    return {
        "format": PLAN_FORMAT,
        "target": plan.target,
        "scheme": plan.scheme,
        "producer_version": plan.producer_version,
        "max_shard_size": plan.max_shard_size,
        "moe": asdict(plan.moe),
        "sources": plan.sources,
        "checks": [[check.kind, *(piece_to_json(source, number) for source in check.reads())] for check in plan.checks],
        "shards": [
            {
                "file": shard.file,
                "header": shard.header,
                "tensors": [
                    [tensor.name, tensor.dtype, tensor.shape, [piece_to_json(piece, number) for piece in tensor.pieces]]
                    for tensor in shard.tensors
                ],
            }
            for shard in plan.shards
        ],
        "config": plan.config,
        "copies": plan.copies,
        "losses": [asdict(loss) for loss in plan.losses],
        "texts": plan.texts,
        "rank": plan.rank.to_json(),
        "quantize": plan.quantize,
    }


def plan_from_json(value: dict[str, Any]) -> Plan:
    """The plan that :func:`plan_to_json` wrote.

    Raises:
        SourceError: the object is not a plan, or of a format that this version does not know.
    """
    if value.get("format") != PLAN_FORMAT:
        raise SourceError(
            "The plan is of another format",
            code="plan-invalid",
            expected=str(PLAN_FORMAT),
            found=repr(value.get("format"))[:40],
        )
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError("The plan cannot be read", code="plan-invalid", found=repr(error)[:120]) from error


def _parse(value: dict[str, Any]) -> Plan:
    sources = tuple(SourceFile(file_name(name), count(size)) for name, size in value["sources"])
    version = value["producer_version"]

    def check(kind: object, *rows: object) -> Check:
        if kind not in ("zero", "equal", "repeats") or len(rows) != (1 if kind == "zero" else 2):
            raise ValueError(f"not a check: {kind!r:.40}")
        return Check(kind, *(piece_from_json(row, sources).source for row in rows))

    def tensor(name: object, dtype: object, shape: list[object], rows: list[object]) -> OutputTensor:
        pieces = tuple(piece_from_json(row, sources) for row in rows)
        return OutputTensor(text(name), text(dtype), tuple(map(count, shape)), pieces)

    def shard(item: dict[str, Any]) -> OutputShard:
        tensors = tuple(tensor(*entry) for entry in item["tensors"])
        return OutputShard(file_name(item["file"]), count(item["header"]), tensors)

    return Plan(
        target=text(value["target"]),
        scheme=text(value["scheme"]),
        producer_version=None if version is None else text(version),
        max_shard_size=count(value["max_shard_size"]),
        moe=moe_from_json(value["moe"]),
        sources=sources,
        checks=tuple(check(*item) for item in value["checks"]),
        shards=tuple(map(shard, value["shards"])),
        config=value["config"],
        copies=tuple(SourceFile(file_name(name), count(size)) for name, size in value["copies"]),
        losses=tuple(Finding(**{**loss, "severity": Severity(loss["severity"])}) for loss in value["losses"]),
        texts=tuple(TextFile(file_name(name), text(content)) for name, content in value["texts"]),
        rank=make_rank(**value["rank"]),
        quantize=_quantize(value["quantize"]),
    )


def _quantize(value: object) -> Literal["missing", "all", "mtp"] | None:
    if value is None or value in ("missing", "all", "mtp"):
        return value
    raise ValueError(f"not a way to quantize: {value!r:.40}")


def plan_digest(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON, in hexadecimal: the identity of a conversion."""
    canonical = json.dumps(plan_to_json(plan), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
