"""``quarkconv.json``: what a conversion wrote, piece by piece, with checksums.

Every byte of the output is covered: the header of each shard, every piece of every tensor, and every other file. A
piece names its source tensor and byte range, so a wrong byte is reported under the name of the expert it belongs to,
and can be compared with the source. The manifest holds no time, path or host: the same source and options give the
same manifest.

    {"format": "quarkconv.manifest/1", "quarkconv": "0.1.0", "plan": SHA-256 of the plan, "checksum": "xxh3-128",
     "target": ..., "scheme": ..., "producer_version": ..., "moe": {...}, "sources": [[file, size], ...],
     "shards": [{"file": ..., "size": ..., "header": [size, checksum],
                 "tensors": [{"name": ..., "dtype": ..., "shape": [...], "pieces": [[PIECE, checksum], ...]}]}],
     "files": [[file, size, checksum], ...]}

:mod:`quarkconv.plan.json` has the rows of a PIECE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from quarkconv.errors import SourceError, naming_files_in
from quarkconv.files.base import Files
from quarkconv.files.json_files import read_json_of
from quarkconv.files.local import LocalFiles
from quarkconv.headers.file_names import MANIFEST_NAME
from quarkconv.plan.fields import checksum, count, file_name, text
from quarkconv.plan.json import moe_from_json, piece_from_json, piece_to_json
from quarkconv.plan.pieces import MoEGeometry, Piece, SourceFile
from quarkconv.text import word

MANIFEST_FORMAT: Final = "quarkconv.manifest/1"
CHECKSUM: Final = "xxh3-128"
MAX_MANIFEST_BYTES: Final = 256 * 2**20
MAX_MANIFEST_VALUES: Final = 12_000_000


class WrittenPiece(NamedTuple):
    """A piece, and the checksum of the output bytes that it gave (XXH3, 128 bits, hexadecimal)."""

    piece: Piece
    checksum: str


class WrittenTensor(NamedTuple):
    """A tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[WrittenPiece, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(written.piece.output_nbytes for written in self.pieces)


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A safetensors file of the output: its size, its header's size and checksum, and its tensors in order."""

    file: str
    size: int
    header: int
    header_checksum: str
    tensors: tuple[WrittenTensor, ...]


class WrittenFile(NamedTuple):
    """Any other file of the output."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of a conversion. See the module for the fields."""

    quarkconv: str
    plan: str
    target: str
    scheme: str
    producer_version: str | None
    moe: MoEGeometry | None
    sources: tuple[SourceFile, ...]
    shards: tuple[WrittenShard, ...]
    files: tuple[WrittenFile, ...]

    def file_names(self) -> Iterator[str]:
        """Every file that the conversion wrote, the manifest included."""
        for shard in self.shards:
            yield shard.file
        for file in self.files:
            yield file.name
        yield MANIFEST_NAME


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file."""
    try:
        return b"".join(_encoded(manifest, ensure_ascii=False))
    except UnicodeEncodeError:  # half a surrogate pair in a string of the config: JSON can only hold it escaped
        return b"".join(_encoded(manifest, ensure_ascii=True))


def _encoded(manifest: Manifest, *, ensure_ascii: bool) -> Iterator[bytes]:
    """The manifest tensor by tensor: 142,000 pieces as one Python value take 50 MB, and their bytes 14."""
    encode = json.JSONEncoder(ensure_ascii=ensure_ascii, separators=(",", ":")).encode
    number = {source.name: position for position, source in enumerate(manifest.sources)}
    about = {
        "format": MANIFEST_FORMAT,
        "quarkconv": manifest.quarkconv,
        "plan": manifest.plan,
        "checksum": CHECKSUM,
        "target": manifest.target,
        "scheme": manifest.scheme,
        "producer_version": manifest.producer_version,
        "moe": None if manifest.moe is None else asdict(manifest.moe),
        "sources": manifest.sources,
    }
    yield f'{encode(about)[:-1]},"shards":['.encode()
    for index, shard in enumerate(manifest.shards):
        header = {"file": shard.file, "size": shard.size, "header": [shard.header, shard.header_checksum]}
        yield f'{"," if index else ""}{encode(header)[:-1]},"tensors":['.encode()
        for position, tensor in enumerate(shard.tensors):
            value = {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "pieces": [[piece_to_json(piece, number), found] for piece, found in tensor.pieces],
            }
            yield f"{',' if position else ''}{encode(value)}".encode()
        yield b"]}"
    yield f'],"files":{encode(manifest.files)}}}\n'.encode()


def read_manifest(model: Path | Files) -> Manifest | None:
    """The manifest of a converted checkpoint, of its directory or its files; None without the file.

    Raises:
        SourceError: it cannot be read, or is of another version.
    """
    files = LocalFiles(model) if isinstance(model, Path) else model
    with naming_files_in(files.root):
        return _manifest_of(files)


def _manifest_of(files: Files) -> Manifest | None:
    path = files.path(MANIFEST_NAME)
    if not (files.size(MANIFEST_NAME) is not None if path is None else path.exists()):
        return None
    value = read_json_of(
        files, MANIFEST_NAME, code="manifest-invalid", limit=MAX_MANIFEST_BYTES, values=MAX_MANIFEST_VALUES
    )
    if value.get("format") != MANIFEST_FORMAT or value.get("checksum") != CHECKSUM:
        raise SourceError(
            "This version of quarkconv cannot read this manifest",
            code="manifest-invalid",
            file=MANIFEST_NAME,
            expected=f"{MANIFEST_FORMAT} with {CHECKSUM}",
            found=f"{word(value.get('format'))} with {word(value.get('checksum'))}",
            hint="use the version of quarkconv that wrote it, or a newer one",
        )
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError(
            "The manifest is malformed",
            code="manifest-invalid",
            file=MANIFEST_NAME,
            found=repr(error)[:120],
            hint="convert the model again",
        ) from error


def _parse(value: dict[str, Any]) -> Manifest:
    sources = tuple(SourceFile(file_name(name), count(size)) for name, size in value["sources"])

    def piece(row: object, found: object) -> WrittenPiece:
        return WrittenPiece(piece_from_json(row, sources), checksum(found))

    def tensor(item: dict[str, Any]) -> WrittenTensor:
        shape = tuple(map(count, item["shape"]))
        pieces = tuple(piece(row, found) for row, found in item["pieces"])
        return WrittenTensor(text(item["name"]), text(item["dtype"]), shape, pieces)

    def shard(item: dict[str, Any]) -> WrittenShard:
        header, found = item["header"]
        return WrittenShard(
            file=file_name(item["file"]),
            size=count(item["size"]),
            header=count(header),
            header_checksum=checksum(found),
            tensors=tuple(map(tensor, item["tensors"])),
        )

    version = value["producer_version"]
    return Manifest(
        quarkconv=text(value["quarkconv"]),
        plan=text(value["plan"]),
        target=text(value["target"]),
        scheme=text(value["scheme"]),
        producer_version=None if version is None else text(version),
        moe=moe_from_json(value["moe"]),
        sources=sources,
        shards=tuple(map(shard, value["shards"])),
        files=tuple(WrittenFile(file_name(name), count(size), checksum(found)) for name, size, found in value["files"]),
    )
