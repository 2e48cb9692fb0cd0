"""A plan: every decision of a conversion, as pure data; carrying it out takes none.

It follows from headers alone and survives a round trip through JSON. The same source and options give the same plan,
wherever the files are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from quarkconv.errors import SourceError
from quarkconv.experts.ranks import WHOLE, Rank, make_rank
from quarkconv.findings import Finding, finding_from_json
from quarkconv.headers.file_names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from quarkconv.plan.fields import count, file_name, text
from quarkconv.plan.json import moe_from_json, piece_from_json, piece_to_json
from quarkconv.plan.pieces import Check, Copy, MoEGeometry, OutputShard, OutputTensor, Piece, SourceFile, TextFile
from quarkconv.scheme.options import DEFAULT, SourceOptions

PLAN_FORMAT: Final = 1
_PLAN_AGAIN: Final = "plan the conversion again with this version of quarkconv"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a conversion.

    Attributes:
        target: name of the target.
        scheme: scheme of the source.
        producer_version: version of the tool that quantized the source, where its config says so.
        max_shard_size: largest size of a shard's data in bytes; a larger tensor has a file of its own.
        moe: geometry of the experts; None where they were not recognised.
        sources: the shards of the source.
        checks: conditions on the source's data, checked before anything is written.
        shards: the safetensors files to write.
        config: config.json to write.
        copies: files of the source that are copied unchanged.
        losses: settings and tensors of the source that the output does not have.
        texts: files with new text, such as the model card.
        rank: the rank whose part of the experts is written.
        options: what else the user requested that decides about the output.
    """

    target: str
    scheme: str
    producer_version: str | None
    max_shard_size: int
    moe: MoEGeometry | None
    sources: tuple[SourceFile, ...]
    checks: tuple[Check, ...]
    shards: tuple[OutputShard, ...]
    config: dict[str, Any]
    copies: tuple[SourceFile, ...]
    losses: tuple[Finding, ...] = ()
    texts: tuple[TextFile, ...] = ()
    rank: Rank = WHOLE
    options: SourceOptions = DEFAULT

    def to_json(self) -> dict[str, Any]:
        """The plan as an object of JSON values; :meth:`from_json` gives an equal plan."""
        number = {source.name: position for position, source in enumerate(self.sources)}

        def rows(pieces: Iterable[Piece]) -> list[list[Any]]:
            return [piece_to_json(piece, number) for piece in pieces]

        return {
            "format": PLAN_FORMAT,
            "target": self.target,
            "scheme": self.scheme,
            "producer_version": self.producer_version,
            "max_shard_size": self.max_shard_size,
            "moe": None if self.moe is None else asdict(self.moe),
            "sources": self.sources,
            "checks": [[check.kind, *rows(check.reads()), *filter(None, [check.dtype])] for check in self.checks],
            "shards": [
                {
                    "file": shard.file,
                    "header": shard.header,
                    "tensors": [
                        [tensor.name, tensor.dtype, tensor.shape, rows(tensor.pieces)] for tensor in shard.tensors
                    ],
                }
                for shard in self.shards
            ],
            "config": self.config,
            "copies": self.copies,
            "losses": [asdict(loss) for loss in self.losses],
            "texts": self.texts,
            "rank": self.rank.to_json(),
            "options": self.options.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan that :meth:`to_json` gave.

        Raises:
            SourceError: the object is not a plan, or of a format that this version does not know.
        """
        if value.get("format") != PLAN_FORMAT:
            raise SourceError(
                "The plan has an unknown format",
                code="plan-invalid",
                expected=str(PLAN_FORMAT),
                found=repr(value.get("format"))[:40],
                hint=_PLAN_AGAIN,
            )
        try:
            return _parse(value)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SourceError(
                "The plan cannot be read", code="plan-invalid", found=repr(error)[:120], hint=_PLAN_AGAIN
            ) from error

    def file_names(self) -> list[str]:
        """Every file that the conversion writes."""
        names = [*(shard.file for shard in self.shards), *(copy.name for copy in self.copies)]
        return [*names, *(file.name for file in self.texts), CONFIG_NAME, INDEX_NAME, MANIFEST_NAME]

    @property
    def output_bytes(self) -> int:
        """Bytes of shards, copies and texts; index, config and manifest come on top."""
        texts = sum(len(file.text.encode()) for file in self.texts)
        return sum(shard.nbytes for shard in self.shards) + sum(copy.size for copy in self.copies) + texts

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors, without headers."""
        return sum(shard.nbytes - shard.header for shard in self.shards)


def _parse(value: dict[str, Any]) -> Plan:
    sources = tuple(SourceFile(file_name(name), count(size)) for name, size in value["sources"])
    version = value["producer_version"]

    def check(kind: object, *rows: object) -> Check:
        match kind, rows:
            case "finite", [first, "F32" | "BF16" | "F16" as dtype]:
                return Check("finite", source(first), dtype=dtype)
            case "zero", [first]:
                return Check("zero", source(first))
            case "zero", [first, "F32" | "BF16" | "F16" as dtype]:
                return Check("zero", source(first), dtype=dtype)
            case "equal" | "repeats" as of_two, [first, second]:
                return Check(of_two, source(first), source(second))
        raise ValueError(f"not a check: {kind!r:.40}")

    def source(row: object) -> Copy:
        return piece_from_json(row, sources).source

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
        losses=tuple(map(finding_from_json, value["losses"])),
        texts=tuple(TextFile(file_name(name), text(content)) for name, content in value["texts"]),
        rank=make_rank(**value["rank"]),
        options=SourceOptions.of(**value["options"]),
    )


def plan_digest(plan: Plan) -> str:
    """SHA-256 of the plan's canonical JSON, in hexadecimal: the identity of a conversion."""
    canonical = json.dumps(plan.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
