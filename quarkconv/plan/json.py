"""A plan as JSON, and back.

File names are written once and referred to by number, since a large plan has 100,000 pieces.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from quarkconv.errors import SourceError
from quarkconv.experts.ranks import make_rank
from quarkconv.findings import Finding, Severity
from quarkconv.plan.pieces import (
    PLAN_FORMAT,
    Check,
    MoEGeometry,
    OutputShard,
    OutputTensor,
    Piece,
    Plan,
    SourceFile,
    TextFile,
)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as an object of JSON values."""
    number = {source.name: position for position, source in enumerate(plan.sources)}

    def piece(item: Piece) -> list[Any]:
        row = [item.tensor, number[item.file], item.start, item.nbytes]
        if item.is_copy:
            return row
        row += [item.widen, item.repeat]
        return [*row, item.scale and piece(item.scale), item.run, item.stride] if item.scale or item.run else row

    return {
        "format": PLAN_FORMAT,
        "target": plan.target,
        "scheme": plan.scheme,
        "producer_version": plan.producer_version,
        "max_shard_size": plan.max_shard_size,
        "moe": asdict(plan.moe),
        "sources": plan.sources,
        "checks": [
            [check.kind, piece(check.first), piece(check.second) if check.second else None] for check in plan.checks
        ],
        "shards": [
            {
                "file": shard.file,
                "header": shard.header,
                "tensors": [
                    [tensor.name, tensor.dtype, tensor.shape, [piece(item) for item in tensor.pieces]]
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
    }


def plan_from_json(value: dict[str, Any]) -> Plan:
    """The plan that :func:`plan_to_json` wrote.

    Raises:
        SourceError: the object is not a plan, or of a format that this version does not know.
    """
    if value.get("format") != PLAN_FORMAT:
        raise SourceError(
            "The plan is of another format", code="plan-invalid",
            expected=str(PLAN_FORMAT), found=repr(value.get("format"))[:40],
        )  # fmt: skip
    try:
        sources = tuple(SourceFile(str(name), int(size)) for name, size in value["sources"])

        def piece(row: list[Any]) -> Piece:
            tensor, file, start, nbytes, *rest = row
            made = Piece(str(tensor), sources[file].name, int(start), int(nbytes))
            if rest:
                made = made._replace(widen=str(rest[0]), repeat=int(rest[1]))
            if rest[2:]:
                scale, run, stride = rest[2:]
                made = made._replace(scale=piece(scale) if scale else None, run=int(run), stride=int(stride))
            return made

        moe = value["moe"]
        return Plan(
            target=value["target"],
            scheme=value["scheme"],
            producer_version=value["producer_version"],
            max_shard_size=value["max_shard_size"],
            moe=MoEGeometry(**{**moe, "layers": tuple(moe["layers"]), "prefixes": tuple(moe["prefixes"])}),
            sources=sources,
            checks=tuple(
                Check(kind, piece(first), piece(second) if second else None) for kind, first, second in value["checks"]
            ),
            shards=tuple(
                OutputShard(
                    shard["file"],
                    shard["header"],
                    tuple(
                        OutputTensor(name, dtype, tuple(shape), tuple(piece(row) for row in pieces))
                        for name, dtype, shape, pieces in shard["tensors"]
                    ),
                )
                for shard in value["shards"]
            ),
            config=value["config"],
            copies=tuple(SourceFile(str(name), int(size)) for name, size in value["copies"]),
            losses=tuple(Finding(**{**loss, "severity": Severity(loss["severity"])}) for loss in value["losses"]),
            texts=tuple(TextFile(str(name), str(text)) for name, text in value["texts"]),
            rank=make_rank(**value["rank"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError("The plan cannot be read", code="plan-invalid", found=repr(error)[:120]) from error


def plan_digest(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON, in hexadecimal: the identity of a conversion."""
    text = json.dumps(plan_to_json(plan), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
