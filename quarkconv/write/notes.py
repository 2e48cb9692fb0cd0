"""The note of a finished shard: the checksums of its pieces. A later run takes them instead of writing it again."""

from __future__ import annotations

from typing import Any

from quarkconv.plan.fields import are_checksums
from quarkconv.plan.manifest import WrittenPiece, WrittenShard, WrittenTensor
from quarkconv.plan.pieces import OutputShard


def note_of(shard: WrittenShard, plan_digest: str) -> dict[str, Any]:
    """The note of a shard."""
    checksums = [[written.checksum for written in tensor.pieces] for tensor in shard.tensors]
    return {"plan": plan_digest, "header": shard.header_checksum, "pieces": checksums}


def written_of(shard: OutputShard, note: dict[str, Any] | None, plan_digest: str) -> WrittenShard | None:
    """The record of a shard from its note; None where the note is missing, invalid, or of another plan."""
    try:
        if note is None or note["plan"] != plan_digest or not are_checksums([note["header"]]):
            return None
        if not all(map(are_checksums, note["pieces"])):
            return None
        tensors = tuple(
            WrittenTensor(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                tuple(WrittenPiece(*pair) for pair in zip(tensor.pieces, checksums, strict=True)),
            )
            for tensor, checksums in zip(shard.tensors, note["pieces"], strict=True)
        )
        return WrittenShard(shard.file, shard.nbytes, shard.header, note["header"], tensors)
    except (ValueError, KeyError, TypeError):
        return None
