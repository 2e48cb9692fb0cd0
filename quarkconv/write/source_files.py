"""The files of a source directory, read at offsets by several threads and never written to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Final

from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.local import LocalFiles
from quarkconv.files.open_limit import allow_open_files, hint_about_open_files
from quarkconv.files.regular import open_regular
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.remote import expect_headers, read_header_of
from quarkconv.plan.manifest import WrittenFile
from quarkconv.plan.pieces import Copy, SourceFile
from quarkconv.plan.plan import Plan
from quarkconv.write.copying import copy_file, read_blocks
from quarkconv.write.refusals import not_as_planned, source_changed
from quarkconv.write.source import Reader
from quarkconv.write.state import FileState

RUN_AGAIN: Final = "when no process writes to the source, run the command again"


class SourceFiles:
    """The shards that a plan reads, opened once and of the planned size."""

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
                    raise source_changed(str(root / name), f"{size} bytes", f"{found} bytes", RUN_AGAIN)
        except OSError as error:
            self.close()
            raise SourceError(
                "A source file cannot be opened",
                code="shard-missing",
                file=os.fsdecode(error.filename or root),
                found=error.strerror,
                hint=hint_about_open_files(error),
            ) from error
        except SourceError:
            self.close()
            raise

    def check_layout(self, plan: Plan) -> None:
        """Raise if a planned range is not in its tensor any more.

        Raises:
            SourceError: a file has another layout than planned.
        """
        check_layout(plan, LocalFiles(self.root))

    def state(self) -> list[FileState]:
        """Name, size and time of modification of each file, in order."""
        return [(name, status.st_size, status.st_mtime_ns) for name, status in self._states.items()]

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise if one of these files changed since it was opened.

        Raises:
            SourceError: a file was written to, cut, replaced or deleted.
        """
        for name in names:
            path, before = self.root / name, self._states[name]
            try:
                for now in (os.fstat(self._descriptors[name]), os.stat(path)):
                    if not os.path.samestat(before, now):
                        raise source_changed(str(path), "the file that was opened", "a different file with that name")
                    if now.st_size != before.st_size:
                        raise source_changed(str(path), f"{before.st_size} bytes", f"{now.st_size} bytes")
                    if now.st_mtime_ns != before.st_mtime_ns:
                        raise source_changed(str(path), "no writes to it", "a later time of modification")
            except OSError as error:
                raise source_changed(str(path), "the file that was opened", error.strerror or str(error)) from error

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def ahead(self, ranges: Iterable[Copy]) -> AbstractContextManager[Reader]:  # noqa: ARG002
        """This object: the kernel reads ahead by itself."""
        return nullcontext(self)

    @property
    def is_slow(self) -> bool:
        """False: disks are fastest with several readers."""
        return False

    def cancel(self) -> None:
        """Does nothing: reads of a disk are short."""

    def copy(self, file: SourceFile, part: Path) -> WrittenFile:
        """Copy a file of the source as it is."""
        return copy_file(self.root, file, part)

    def blocks(self, file: SourceFile) -> Iterator[bytes]:
        """The bytes of a file of the source, in blocks."""
        return read_blocks(self.root / file.name)

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""
        position = 0
        while position < len(view):
            try:
                at = source.start + offset + position
                count = os.preadv(self._descriptors[source.file], [view[position:]], at)
            except OSError as error:
                raise SourceError(
                    "Reading the source failed",
                    code="shard-truncated",
                    file=str(self.root / source.file),
                    tensor=source.tensor,
                    found=error.strerror,
                    hint="check the disk, then run the command again",
                ) from error
            if count == 0:
                raise SourceError(
                    "A source file ended while it was read",
                    code="shard-truncated",
                    file=str(self.root / source.file),
                    tensor=source.tensor,
                    expected=f"{source.nbytes} bytes",
                    found=f"{offset + position} bytes",
                    hint="run the command again when no process writes to the source",
                )
            position += count


def check_layout(plan: Plan, files: Files) -> None:
    """Raise if a range that a plan reads is not in its tensor in ``files``.

    Raises:
        SourceError: a file has another layout than planned.
    """
    with collector_paused():
        expect_headers(files, [source.name for source in plan.sources])
        refs = {name: ref for source in plan.sources for name, ref in read_header_of(files, source.name).refs()}
    read = (source for shard in plan.shards for piece in shard.pieces() for source in piece.reads())
    checked = (source for check in plan.checks for source in check.reads())
    for source in chain(read, checked):
        ref = refs.get(source.tensor)
        if (
            ref is None
            or ref.file != source.file
            or not (ref.start <= source.start and source.start + source.nbytes <= ref.start + ref.nbytes)
        ):
            here = ref is not None and ref.file == source.file
            raise not_as_planned(
                str(files.root / source.file),
                expected=f"its bytes from {source.start} to {source.start + source.nbytes}",
                found=f"the tensor from {ref.start} to {ref.end}" if ref and here else "no such tensor in this file",
                tensor=source.tensor,
            )
