"""The files of the source, read at offsets by several threads; nothing is ever written to them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path

from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.local import LocalFiles
from quarkconv.files.open_limit import allow_open_files, hint_about_open_files
from quarkconv.files.regular import open_regular
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.remote import expect_headers, read_header_of
from quarkconv.plan.manifest import WrittenFile
from quarkconv.plan.pieces import Copy, Plan, SourceFile
from quarkconv.write.copying import copy_file
from quarkconv.write.source import Reader
from quarkconv.write.state import FileState


class SourceFiles:
    """The shards that a plan reads, opened once and of the size that the plan was made for."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}
        self._states: dict[str, os.stat_result] = {}
        allow_open_files(len(plan.sources))
        try:
            for name, size in plan.sources:
                descriptor = open_regular(root / name)
                self._descriptors[name] = descriptor
                self._states[name] = os.fstat(descriptor)
                found = self._states[name].st_size
                if found != size:
                    raise _changed(root / name, f"{size} bytes", f"{found} bytes", "give the command again")
        except OSError as error:
            self.close()
            raise SourceError(
                "A source file cannot be opened", code="shard-missing", file=os.fsdecode(error.filename or root),
                found=error.strerror, hint=hint_about_open_files(error),
            ) from error  # fmt: skip
        except SourceError:
            self.close()
            raise

    def check_layout(self, plan: Plan) -> None:
        """Raise if a range that the plan reads is not where its tensor lies: a plan may be older than its source.

        Raises:
            SourceError: a file has another layout than the plan was made of.
        """
        check_layout(plan, LocalFiles(self.root))

    def state(self) -> list[FileState]:
        """Name, size and time of modification of each file, in order."""
        return [(name, status.st_size, status.st_mtime_ns) for name, status in self._states.items()]

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise if any of some files is not what it was when it was opened.

        Raises:
            SourceError: a file was written to, cut, replaced or deleted.
        """
        for name in names:
            path, before = self.root / name, self._states[name]
            try:
                for now in (os.fstat(self._descriptors[name]), os.stat(path)):
                    if not os.path.samestat(before, now):
                        raise _changed(path, "the file that was opened", "another file of that name")
                    if now.st_size != before.st_size:
                        raise _changed(path, f"{before.st_size} bytes", f"{now.st_size} bytes")
                    if now.st_mtime_ns != before.st_mtime_ns:
                        raise _changed(path, "no writes to it", "a later time of modification")
            except OSError as error:
                raise _changed(path, "the file that was opened", error.strerror or str(error)) from error

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def ahead(self, ranges: Iterable[Copy]) -> AbstractContextManager[Reader]:  # noqa: ARG002
        """This object: the kernel reads ahead by itself."""
        return nullcontext(self)

    def cancel(self) -> None:
        """Nothing is done: no read of a disk takes long."""

    def copy(self, file: SourceFile, part: Path) -> WrittenFile:
        """Copy a file of the source as it is."""
        return copy_file(self.root, file, part)

    def read(self, source: Copy) -> bytes:
        """The bytes of a small range."""
        data = bytearray(source.nbytes)
        self.fill(source, 0, memoryview(data))
        return bytes(data)

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""
        position = 0
        while position < len(view):
            try:
                at = source.start + offset + position
                count = os.preadv(self._descriptors[source.file], [view[position:]], at)
            except OSError as error:
                raise SourceError(
                    "Reading the source failed", code="shard-truncated", file=str(self.root / source.file),
                    tensor=source.tensor, found=error.strerror, hint="check the disk, then run the command again",
                ) from error  # fmt: skip
            if count == 0:
                raise SourceError(
                    "A source file ended while it was read", code="shard-truncated",
                    file=str(self.root / source.file), tensor=source.tensor, expected=f"{source.nbytes} bytes",
                    found=f"{offset + position} bytes", hint="run the command again when nothing writes to the source",
                )  # fmt: skip
            position += count


def check_layout(plan: Plan, files: Files) -> None:
    """Raise if a range that a plan reads is not where its tensor lies in ``files``.

    Raises:
        SourceError: a file has another layout than the plan was made of.
    """
    with collector_paused():
        expect_headers(files, [source.name for source in plan.sources])
        refs = {name: ref for source in plan.sources for name, ref in read_header_of(files, source.name).refs()}
    pieces = (piece for shard in plan.shards for tensor in shard.tensors for piece in tensor.pieces)
    read = (source for piece in pieces for source in piece.reads())
    checked = (source for check in plan.checks for source in check.reads())
    for source in chain(read, checked):
        ref = refs.get(source.tensor)
        if (
            ref is None
            or ref.file != source.file
            or not (ref.start <= source.start and source.start + source.nbytes <= ref.start + ref.nbytes)
        ):
            raise SourceError(
                "The source is not the one that the plan was made of", code="source-changed",
                file=str(files.root / source.file), tensor=source.tensor,
                expected=f"its bytes from {source.start} to {source.start + source.nbytes}",
                found="no such tensor in this file" if ref is None or ref.file != source.file
                else f"the tensor from {ref.start} to {ref.start + ref.nbytes}",
                hint="make the plan again",
            )  # fmt: skip


def _changed(path: Path, expected: str, found: str, command: str = "start anew with --overwrite") -> SourceError:
    return SourceError(
        "A source file changed while the model was converted", code="source-changed", file=str(path),
        expected=expected, found=found, hint=f"when nothing writes to the source any more, {command}",
    )  # fmt: skip
