"""Disk space: checked before the first byte is written, and explained when it runs out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from quarkconv.errors import WriteError
from quarkconv.plan.pieces import OutputShard
from quarkconv.text import size
from quarkconv.write.durable import FULL, as_write_error

_BYTES_OF_A_PIECE: Final = 160  # its rows in the manifest and in the notes, without the names of the tensors
_BYTES_AT_LEAST: Final = 2**20  # config, folders and the file system's own records


def records_nbytes(shards: Iterable[OutputShard]) -> int:
    """Upper bound on the size of notes, index and manifest, in bytes."""
    nbytes = _BYTES_AT_LEAST
    for shard in shards:
        for tensor in shard.tensors:
            nbytes += 3 * len(tensor.name) + 200
            named = (source for piece in tensor.pieces for source in piece.reads() or (piece.source,))
            nbytes += sum(_BYTES_OF_A_PIECE + len(source.tensor) for source in named)
    return nbytes


def allocated(paths: Iterable[Path]) -> int:
    """The disk space of files in bytes, which deleting or overwriting them frees."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file() and not path.is_symlink())


def require_space(output: Path, needed: int, reclaimed: int) -> None:
    """Refuse a conversion that does not fit on the disk.

    Args:
        output: a directory on the disk that is written to.
        needed: bytes that will be written.
        reclaimed: bytes that will be freed before.

    Raises:
        WriteError: there is less space.
    """
    free = shutil.disk_usage(output).free
    missing = needed - reclaimed - free
    if missing > 0:
        raise WriteError(
            "Not enough space for the output",
            file=str(output),
            expected=f"{size(needed)} free",
            found=size(free) + (f", and {size(reclaimed)} in the earlier conversion" if reclaimed else ""),
            hint=f"free {_rounded_up(missing)} more and run the same command again, or choose --out on another disk",
        )


@contextmanager
def disk_full_explained(output: Path, reclaimed: Callable[[], int], left: Callable[[], int]) -> Iterator[None]:
    """Report how much space is missing when the disk gets full.

    Args:
        output: a directory on the disk that is written to.
        reclaimed: returns the number of bytes that the next run frees, or writes again in their places.
        left: returns the number of bytes still to be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        failure = as_write_error(error, output)
        free, needed = shutil.disk_usage(output).free + reclaimed(), left()
        failure.file = str(output)
        failure.expected = f"{size(needed)} free"
        failure.found = size(free)
        failure.hint = (
            f"nothing is lost: free {_rounded_up(needed - free)}, then run the same command again; "
            "it resumes where it stopped"
        )
        raise failure from error


def _rounded_up(nbytes: int) -> str:
    """A size in MB, or from 1 GB on in GB, rounded up."""
    megabytes = max(-(-nbytes // 10**6), 1)
    return f"{megabytes} MB" if megabytes < 1000 else f"{-(-megabytes // 10) / 100:.2f} GB"
