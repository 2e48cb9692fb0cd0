"""A checkpoint as its headers tell it: config.json, the index and the header of every shard.

Opening reads no tensor data and believes nothing twice: what is missing, malformed or contradictory becomes a
finding, and whatever can still be read is there, so that ``inspect`` can describe a damaged checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError
from quarkconv.findings import Finding, finding
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.json_files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, read_json_object
from quarkconv.headers.rank_index import refuse_ranks
from quarkconv.headers.safetensors import Kind, ShardHeader, TensorRef, read_header
from quarkconv.headers.unfinished import refuse_unfinished

CONFIG_NAME: Final = "config.json"
INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
MANIFEST_NAME: Final = "quarkconv.json"
"""What a conversion wrote; see :mod:`quarkconv.manifest`."""
_SHARD_NAME: Final = re.compile(r"[^/\\]*\.safetensors", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of a checkpoint.

    Attributes:
        root: the directory.
        config: config.json, ``{}`` when it cannot be read.
        shards: the header of every file that holds tensors of the model, in the order of their names.
        kinds: name -> (dtype, shape) of every tensor.
        findings: what is wrong with the files themselves.
    """

    root: Path
    config: dict[str, Any]
    shards: tuple[ShardHeader, ...]
    kinds: dict[str, Kind]
    findings: tuple[Finding, ...]

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes, without headers."""
        return sum(shard.size + shard.truncated - shard.data_start for shard in self.shards)

    def refs(self) -> dict[str, TensorRef]:
        """Name -> byte range of every tensor."""
        with collector_paused():
            return {name: ref for shard in self.shards for name, ref in shard.refs()}

    def files(self) -> Iterator[Path]:
        """Every file below the root that lies in no hidden folder, relative to the root, in the order of names."""
        for path in sorted(self.root.rglob("*")):
            relative = path.relative_to(self.root)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts[:-1]):
                yield relative


def open_checkpoint(root: Path) -> Checkpoint:
    """Read the headers of the checkpoint in a directory.

    Raises:
        SourceError: the directory does not exist, is an unfinished conversion, or holds no safetensors file.
    """
    _check_directory(root)
    findings: list[Finding] = []
    config: dict[str, Any] = {}
    try:
        config = read_json_object(root / CONFIG_NAME, code="config-invalid", limit=MAX_CONFIG_BYTES)
    except SourceError as error:
        findings.append(_as_finding(error))
    weight_map = _read_index(root, findings)
    shards: list[ShardHeader] = []
    kinds: dict[str, Kind] = {}
    with collector_paused():
        for file in _shard_names(root, weight_map, findings):
            try:
                shard = read_header(root / file, file)
            except SourceError as error:
                findings.append(_as_finding(error))
                continue
            if shard.truncated:
                findings.append(_truncated(shard))
            shards.append(shard)
            kinds.update(zip(shard.names, shard.kinds, strict=True))
        findings.extend(_duplicates(shards, len(kinds)))
        if weight_map is not None:
            findings.extend(_compare_index(weight_map, shards))
    return Checkpoint(root, config, tuple(shards), kinds, tuple(findings))


def _check_directory(root: Path) -> None:
    if not root.is_dir():
        raise SourceError(
            "There is no such model directory", code="shard-missing", file=str(root),
            expected="a directory with config.json and *.safetensors, or a Hub repo id such as org/name",
            found="a file" if root.exists() else "nothing",
        )  # fmt: skip
    refuse_unfinished(root)
    refuse_ranks(root)


def _read_index(root: Path, findings: list[Finding]) -> dict[str, str] | None:
    """The index's weight_map, or None where there is no index that can be used."""
    path = root / INDEX_NAME
    if not path.exists():
        return None
    try:
        index = read_json_object(path, code="index-invalid", limit=MAX_INDEX_BYTES)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise SourceError(
                "The index has no weight_map", code="index-invalid", file=INDEX_NAME,
                expected="an object from tensor to file", found=type(weight_map).__name__,
            )  # fmt: skip
        for file in _distinct_values(weight_map):
            if not (isinstance(file, str) and _SHARD_NAME.fullmatch(file)):
                raise SourceError(
                    "The index names something that is no shard of this directory", code="index-invalid",
                    file=INDEX_NAME, expected="plain names of .safetensors files", found=repr(file)[:120],
                )  # fmt: skip
    except SourceError as error:
        findings.append(_as_finding(error))
        return None
    return weight_map


def _distinct_values(weight_map: dict[str, Any]) -> Collection[object]:
    """The files that a weight_map names; as a list where it maps to something that is no file name at all."""
    try:
        return set(weight_map.values())
    except TypeError:
        return list(weight_map.values())


def _shard_names(root: Path, weight_map: dict[str, str] | None, findings: list[Finding]) -> list[str]:
    """The files that make up the model: those of the index; without one, model.safetensors or whatever there is."""
    present = sorted(path.name for path in root.glob("*.safetensors"))
    if weight_map is not None:
        named = sorted(set(weight_map.values()))
        unused = sorted(set(present) - set(named))
        if unused:
            findings.append(
                finding(
                    "file-unused", unused[0], f"{len(unused)} safetensors file(s) are not named by {INDEX_NAME}",
                    hint="remove them, or repair the index", count=len(unused),
                )
            )  # fmt: skip
        return named
    if SINGLE_NAME in present:
        return [SINGLE_NAME]
    if not present:
        raise SourceError(
            "The directory holds no safetensors file", code="shard-missing", file=str(root),
            expected=f"{SINGLE_NAME}, or shards with {INDEX_NAME}", found="no *.safetensors",
            hint="give the directory that holds config.json and the weights",
        )  # fmt: skip
    return present


def _duplicates(shards: list[ShardHeader], distinct: int) -> Iterator[Finding]:
    if sum(len(shard.names) for shard in shards) == distinct:
        return
    first: dict[str, str] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for shard in shards:
        for name in shard.names:
            other = first.setdefault(name, shard.file)
            if other != shard.file:
                twice.setdefault((other, shard.file), []).append(name)
    for (one, other), names in twice.items():
        yield finding(
            "tensor-duplicate", names[0], f"{len(names)} tensor(s) lie in {one} and in {other}, first {names[0]}",
            hint="keep one of them; engines disagree about which one they load", count=len(names),
        )  # fmt: skip


def _compare_index(weight_map: dict[str, str], shards: list[ShardHeader]) -> Iterator[Finding]:
    agree = all(set(map(weight_map.get, shard.names)) == {shard.file} for shard in shards if shard.names)
    if agree and sum(len(shard.names) for shard in shards) == len(weight_map):
        return
    stored: dict[str, str] = {}
    for shard in shards:
        stored.update(dict.fromkeys(shard.names, shard.file))
    contents = {shard.file: set(shard.names) for shard in shards}
    missing = [name for name, file in weight_map.items() if file in contents and name not in contents[file]]
    extra = [name for name in stored if name not in weight_map]
    if missing:
        place = stored.get(missing[0])
        yield finding(
            "index-mismatch", missing[0],
            f"{len(missing)} tensor(s) are not in the file that the index names: {missing[0]} should be in "
            f"{weight_map[missing[0]]}, " + (f"and is in {place}" if place else "and is nowhere"),
            hint="download the checkpoint again, or rebuild the index", count=len(missing),
        )  # fmt: skip
    if extra:
        yield finding(
            "index-mismatch", extra[0],
            f"{len(extra)} stored tensor(s) are not in the index, such as {extra[0]} in {stored[extra[0]]}",
            hint="rebuild the index: loaders that follow it drop these tensors", count=len(extra),
        )  # fmt: skip


def _truncated(shard: ShardHeader) -> Finding:
    available = shard.size - shard.data_start
    lost = [name for name, end in zip(shard.names, shard.ends, strict=True) if end > available]
    return finding(
        "shard-truncated", shard.file,
        f"The file ends {shard.truncated} bytes before its data does; {len(lost)} tensor(s) are cut, first {lost[0]}",
        hint="download or copy the file again", count=len(lost),
    )  # fmt: skip


def _as_finding(error: SourceError) -> Finding:
    parts = [error.message, *(f"{label} {text}" for label, text in error.details() if label in ("expected", "found"))]
    subject = error.file or error.tensor or ""
    if error.tensor is not None:
        parts.insert(1, f"tensor {error.tensor}")
    return finding(error.code, subject, "; ".join(parts), hint=error.hint or "")
