"""``quarkconv.json``: what a conversion wrote, piece by piece, with checksums.

Every byte of the output is covered: the header of each shard, every piece of every tensor, and every other file. A
piece names the source tensor and byte range that it came from, so that a wrong byte can be told by the name of the
expert it belongs to, and compared with the source where that is at hand. The manifest holds no time, path or host: the
same source and options give the same manifest.

    {"format": "quarkconv.plan.manifest/1", "quarkconv": "0.1.0", "plan": SHA-256 of the plan, "checksum": "xxh3-128",
     "target": ..., "scheme": ..., "producer_version": ..., "moe": {...}, "sources": [[file, size], ...],
     "shards": [{"file": ..., "size": ..., "header": [size, checksum],
                 "tensors": [{"name": ..., "dtype": ..., "shape": [...], "pieces": [
                     [source tensor, number in sources, start, nbytes, widen, repeat, checksum,
                      [scale's tensor, number, start, nbytes, widen, repeat] or null, run, stride]]}]}],
     "files": [[file, size, checksum], ...]}

The last three values of a piece are there only where codes became weights or columns were cut out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from quarkconv.errors import SourceError
from quarkconv.files.json_files import read_json_object
from quarkconv.headers.checkpoint import MANIFEST_NAME
from quarkconv.plan.pieces import MoEGeometry, Piece, SourceFile
from quarkconv.text import word

MANIFEST_FORMAT: Final = "quarkconv.plan.manifest/1"
CHECKSUM: Final = "xxh3-128"
MAX_MANIFEST_BYTES: Final = 256 * 2**20
MAX_MANIFEST_VALUES: Final = 12_000_000
_CHECKSUM: Final = re.compile("[0-9a-f]{32}")
_PLAIN_ROW: Final = 7


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
    """What a conversion wrote. See the module for the fields."""

    quarkconv: str
    plan: str
    target: str
    scheme: str
    producer_version: str | None
    moe: MoEGeometry
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
    number = {source.name: position for position, source in enumerate(manifest.sources)}
    value = {
        "format": MANIFEST_FORMAT,
        "quarkconv": manifest.quarkconv,
        "plan": manifest.plan,
        "checksum": CHECKSUM,
        "target": manifest.target,
        "scheme": manifest.scheme,
        "producer_version": manifest.producer_version,
        "moe": asdict(manifest.moe),
        "sources": manifest.sources,
        "shards": [
            {
                "file": shard.file,
                "size": shard.size,
                "header": [shard.header, shard.header_checksum],
                "tensors": [
                    {
                        "name": tensor.name,
                        "dtype": tensor.dtype,
                        "shape": tensor.shape,
                        "pieces": [_piece_row(written, number) for written in tensor.pieces],
                    }
                    for tensor in shard.tensors
                ],
            }
            for shard in manifest.shards
        ],
        "files": manifest.files,
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a string of the config: JSON has it escaped only
        return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a converted checkpoint; None when there is none.

    Raises:
        SourceError: there is one, and it cannot be read or is of another version.
    """
    path = root / MANIFEST_NAME
    if not path.exists():
        return None
    value = read_json_object(path, code="manifest-invalid", limit=MAX_MANIFEST_BYTES, values=MAX_MANIFEST_VALUES)
    if value.get("format") != MANIFEST_FORMAT or value.get("checksum") != CHECKSUM:
        raise SourceError(
            "The manifest is of a version that this quarkconv does not know", code="manifest-invalid",
            file=MANIFEST_NAME, expected=f"{MANIFEST_FORMAT} with {CHECKSUM}",
            found=f"{word(value.get('format'))} with {word(value.get('checksum'))}",
            hint="use the version of quarkconv that wrote it, or a later one",
        )  # fmt: skip
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError(
            "The manifest is malformed", code="manifest-invalid", file=MANIFEST_NAME, found=repr(error)[:120],
            hint="convert the model again",
        ) from error  # fmt: skip


def _piece_row(written: WrittenPiece, number: dict[str, int]) -> list[Any]:
    piece = written.piece
    row = [*_range_row(piece, number), written.checksum]
    if piece.scale is None and not piece.run:
        return row
    return [*row, piece.scale and _range_row(piece.scale, number), piece.run, piece.stride]


def _range_row(piece: Piece, number: dict[str, int]) -> list[Any]:
    return [piece.tensor, number[piece.file], piece.start, piece.nbytes, piece.widen, piece.repeat]


def _parse(value: dict[str, Any]) -> Manifest:
    sources = tuple(SourceFile(_file(name), _size(size)) for name, size in value["sources"])

    def source_range(row: list[Any]) -> Piece:
        tensor, file, start, nbytes, widen, repeat = row
        if widen not in ("", "BF16", "F16"):
            raise ValueError(f"unknown computation {widen!r}")
        source = sources[_size(file)].name
        return Piece(_text(tensor), source, _size(start), _size(nbytes), widen, _size(repeat))

    def piece(row: list[Any]) -> WrittenPiece:
        made, checksum = source_range(row[:6]), _checksum(row[6])
        if len(row) == _PLAIN_ROW:
            return WrittenPiece(made, checksum)
        scale, run, stride = row[_PLAIN_ROW:]
        made = made._replace(scale=source_range(scale) if scale else None, run=_size(run), stride=_size(stride))
        _check_computation(made)
        return WrittenPiece(made, checksum)

    def tensor(item: dict[str, Any]) -> WrittenTensor:
        shape = tuple(_size(dimension) for dimension in item["shape"])
        pieces = tuple(piece(row) for row in item["pieces"])
        return WrittenTensor(_text(item["name"]), _text(item["dtype"]), shape, pieces)

    def shard(item: dict[str, Any]) -> WrittenShard:
        header, checksum = item["header"]
        tensors = tuple(tensor(entry) for entry in item["tensors"])
        return WrittenShard(_file(item["file"]), _size(item["size"]), _size(header), _checksum(checksum), tensors)

    version = value["producer_version"]
    return Manifest(
        quarkconv=_text(value["quarkconv"]),
        plan=_text(value["plan"]),
        target=_text(value["target"]),
        scheme=_text(value["scheme"]),
        producer_version=None if version is None else _text(version),
        moe=_moe(value["moe"]),
        sources=sources,
        shards=tuple(shard(item) for item in value["shards"]),
        files=tuple(
            WrittenFile(_file(name), _size(size), _checksum(checksum)) for name, size, checksum in value["files"]
        ),
    )


def _check_computation(piece: Piece) -> None:
    """Refuse a computation whose numbers do not fit together: verification divides by them."""
    plain = not piece.widen and piece.repeat == 1
    if piece.scale is not None and not piece.run:
        rows, rest = divmod(piece.scale.output_nbytes, 4)
        if plain and not rest and (piece.nbytes % rows == 0 if rows else piece.nbytes == 0):
            return
    elif plain and piece.scale is None and 0 < piece.run <= piece.stride and piece.nbytes % piece.run == 0:
        return
    raise ValueError("a computation whose sizes do not fit together")


def _moe(value: dict[str, Any]) -> MoEGeometry:
    top_k, activation = value["top_k"], value["activation_function"]
    return MoEGeometry(
        layers=tuple(map(_size, value["layers"])),
        prefixes=tuple(map(_text, value["prefixes"])),
        experts=_size(value["experts"]),
        top_k=None if top_k is None else _size(top_k),
        hidden_size=_size(value["hidden_size"]),
        intermediate_size=_size(value["intermediate_size"]),
        activation_function=None if activation is None else _text(activation),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {value!r:.40}")
    return value


def are_checksums(values: object) -> bool:
    """Whether a value is a list of checksums."""
    return isinstance(values, list) and all(isinstance(item, str) and _CHECKSUM.fullmatch(item) for item in values)


def _checksum(value: object) -> str:
    if not are_checksums([value]):
        raise ValueError(f"not a checksum: {value!r:.40}")
    return _text(value)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"expected a whole number, found {value!r:.40}")
    return value


def _file(value: object) -> str:
    """A relative path that stays inside the directory."""
    name = _text(value)
    name.encode()  # half a surrogate pair is in no file's name, and raises
    if (
        "\0" in name
        or name.startswith("/")
        or "\\" in name
        or not name
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise ValueError(f"not a path inside the checkpoint: {name!r:.80}")
    return name
