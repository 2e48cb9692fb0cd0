"""The files of the source, read at offsets by several threads; nothing is ever written to them."""

from __future__ import annotations

import os
from pathlib import Path

from quarkconv.errors import SourceError
from quarkconv.plan.pieces import Piece, Plan


class SourceFiles:
    """The shards that a plan reads, opened once and of the size that the plan was made for."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}
        try:
            for name, size in plan.sources:
                descriptor = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC)
                self._descriptors[name] = descriptor
                found = os.fstat(descriptor).st_size
                if found != size:
                    raise SourceError(
                        "A source file has changed since the plan was made", code="shard-truncated",
                        file=str(root / name), expected=f"{size} bytes", found=f"{found} bytes",
                        hint="give the command again when nothing writes to the source",
                    )  # fmt: skip
        except OSError as error:
            self.close()
            raise SourceError(
                "A source file cannot be opened", code="shard-missing", file=str(error.filename),
                found=error.strerror,
            ) from error  # fmt: skip
        except SourceError:
            self.close()
            raise

    def state(self) -> list[list[int]]:
        """Size and time of modification (ns) of each file, in order: what tells a source from another one like it."""
        found = map(os.fstat, self._descriptors.values())
        return [[status.st_size, status.st_mtime_ns] for status in found]

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, piece: Piece) -> bytes:
        """The source range of a small piece."""
        data = bytearray(piece.nbytes)
        self.fill(piece, 0, memoryview(data))
        return bytes(data)

    def fill(self, piece: Piece, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a piece from ``offset`` on."""
        position = 0
        while position < len(view):
            try:
                at = piece.start + offset + position
                count = os.preadv(self._descriptors[piece.file], [view[position:]], at)
            except OSError as error:
                raise SourceError(
                    "Reading the source failed", code="shard-truncated", file=str(self.root / piece.file),
                    tensor=piece.tensor, found=error.strerror, hint="check the disk, then give the command again",
                ) from error  # fmt: skip
            if count == 0:
                raise SourceError(
                    "A source file ended while it was read", code="shard-truncated",
                    file=str(self.root / piece.file), tensor=piece.tensor, expected=f"{piece.nbytes} bytes",
                    found=f"{offset + position} bytes", hint="give the command again when nothing writes to the source",
                )  # fmt: skip
            position += count
