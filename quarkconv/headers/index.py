"""The index of a sharded checkpoint: what it says, and where the headers say something else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Final, NamedTuple

from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.json_files import MAX_INDEX_BYTES, read_json_of
from quarkconv.findings import Finding, as_finding, finding
from quarkconv.headers.safetensors import ShardHeader
from quarkconv.text import shortened, shown

INDEX_NAME: Final = "model.safetensors.index.json"
MAX_SHARDS: Final = 10_000
"""Files that an index may name; the largest models have some hundreds."""
_SHARD_NAME: Final = re.compile(r"[^/\\]*\.safetensors", re.DOTALL)


class Index(NamedTuple):
    """What an index says.

    Attributes:
        weight_map: tensor -> file.
        total_size: bytes of all tensors, as it was found, of any type; None where nothing is said.
    """

    weight_map: dict[str, str]
    total_size: object


def read_index(store: Files, findings: list[Finding]) -> Index | None:
    """The index of a checkpoint, or None where there is none that can be used; why not is added to ``findings``."""
    path = store.path(INDEX_NAME)
    if store.size(INDEX_NAME) is None if path is None else not (path.exists() or path.is_symlink()):
        return None
    try:
        index = read_json_of(store, INDEX_NAME, code="index-invalid", limit=MAX_INDEX_BYTES)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise SourceError(
                "The index has no weight_map", code="index-invalid", file=INDEX_NAME,
                expected="an object from tensor to file", found=type(weight_map).__name__,
            )  # fmt: skip
        files = _distinct_values(weight_map)
        for file in files:
            if not (isinstance(file, str) and _SHARD_NAME.fullmatch(file)):
                raise SourceError(
                    "The index names something that is no shard of this directory", code="index-invalid",
                    file=INDEX_NAME, expected="plain names of .safetensors files", found=shown(file),
                )  # fmt: skip
        if len(files) > MAX_SHARDS:
            raise SourceError(
                "The index names more files than can be believed", code="index-invalid", file=INDEX_NAME,
                expected=f"at most {MAX_SHARDS} files", found=str(len(files)),
            )  # fmt: skip
    except SourceError as error:
        findings.append(as_finding(error))
        return None
    metadata = index.get("metadata")
    return Index(weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None)


def _distinct_values(weight_map: dict[str, Any]) -> Collection[object]:
    """The files that a weight_map names; as a list where it maps to something that is no file name at all."""
    try:
        return set(weight_map.values())
    except TypeError:
        return list(weight_map.values())


def compare_index(index: Index, shards: list[ShardHeader]) -> Iterator[Finding]:
    """Where index and headers disagree."""
    weight_map = index.weight_map
    agree = all(set(map(weight_map.get, shard.names)) == {shard.file} for shard in shards if shard.names)
    if not agree or sum(len(shard.names) for shard in shards) != len(weight_map):
        yield from _wrong_places(weight_map, shards)
    # A wrong number is not news: Quark's file-to-file mode writes the size of the files, and others that of the model
    # before it was quantized. It is not believed either, since sizes are those of the headers.
    if not _is_size(index.total_size):
        yield finding(
            "index-total-size", INDEX_NAME, f"The total size in the index is {shown(index.total_size)}",
            hint="nothing depends on it but estimates; conversion writes an index that is right",
        )  # fmt: skip


def _is_size(value: object) -> bool:
    """Whether a value is a number of bytes; older tools write it with a fraction of zero."""
    if isinstance(value, float):
        return value >= 0 and value.is_integer()
    return value is None or (type(value) is int and 0 <= value < 2**63)


def _wrong_places(weight_map: dict[str, str], shards: list[ShardHeader]) -> Iterator[Finding]:
    stored: dict[str, str] = {}
    for shard in shards:
        stored.update(dict.fromkeys(shard.names, shard.file))
    contents = {shard.file: set(shard.names) for shard in shards}
    missing = [name for name, file in weight_map.items() if file in contents and name not in contents[file]]
    extra = [name for name in stored if name not in weight_map]
    if missing:
        place, first = stored.get(missing[0]), shortened(missing[0])
        yield finding(
            "index-mismatch", first,
            f"{len(missing)} tensor(s) are not in the file that the index names: {first} should be in "
            f"{weight_map[missing[0]]}, " + (f"and is in {place}" if place else "and is nowhere"),
            hint="download the checkpoint again, or rebuild the index", count=len(missing),
        )  # fmt: skip
    if extra:
        yield finding(
            "index-mismatch", extra[0],
            f"{len(extra)} stored tensor(s) are not in the index, such as {extra[0]} in {stored[extra[0]]}",
            hint="rebuild the index: loaders that follow it drop these tensors", count=len(extra),
        )  # fmt: skip
