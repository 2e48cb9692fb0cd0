"""Space on the disk: asked for before the first byte, and told when it has run out all the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from quarkconv.errors import WriteError
from quarkconv.plan.pieces import OutputShard
from quarkconv.write.durable import FULL, as_write_error

_BYTES_OF_A_PIECE: Final = 160  # its rows in the manifest and in the notes, beside the names of the two tensors
_BYTES_AT_LEAST: Final = 2**20  # config, folders, and what the file system itself needs for them


def records_nbytes(shards: Iterable[OutputShard]) -> int:
    """What notes, index and manifest take at most, in bytes."""
    nbytes = _BYTES_AT_LEAST
    for shard in shards:
        for tensor in shard.tensors:
            nbytes += 3 * len(tensor.name) + 200
            reads = (source for piece in tensor.pieces for source in piece.reads())
            nbytes += sum(_BYTES_OF_A_PIECE + len(source.tensor) for source in reads)
    return nbytes


def allocated(paths: Iterable[Path]) -> int:
    """The disk space of files, in bytes: what deleting or overwriting them frees."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file() and not path.is_symlink())


def require_space(output: Path, needed: int, reclaimed: int) -> None:
    """Refuse a conversion that does not fit.

    Args:
        output: a directory on the disk that is written to.
        needed: bytes that will be written.
        reclaimed: bytes that will be freed before.

    Raises:
        WriteError: there is less space than that.
    """
    free = shutil.disk_usage(output).free
    missing = needed - reclaimed - free
    if missing > 0:
        raise WriteError(
            "There is not enough space for the output", file=str(output),
            expected=f"{needed / 1e9:.2f} GB for what is still to be written", found=f"{free / 1e9:.2f} GB free",
            hint=f"free {_rounded_up(missing)} more and give the same command again, or give --out on another disk",
        )  # fmt: skip


@contextmanager
def running_out_told(output: Path, parts: Path, left: Callable[[], int]) -> Iterator[None]:
    """Tell a user how much is missing when the disk gets full.

    Args:
        output: a directory on the disk that is written to.
        parts: the folder of what is in progress and will be written anew.
        left: tells the number of bytes that are still to be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        told = as_write_error(error, output)
        free, needed = shutil.disk_usage(output).free + allocated(parts.rglob("*")), left()
        told.file = str(output)
        told.expected = f"{needed / 1e9:.2f} GB for what is still to be written"
        told.found = f"{free / 1e9:.2f} GB that can be used"
        told.hint = (
            f"nothing is lost: free {_rounded_up(needed - free)}, then give the same command again; "
            "it resumes where it stopped"
        )
        raise told from error


def _rounded_up(nbytes: int) -> str:
    """A number of bytes for people, never less than it is."""
    return f"{max(-(-nbytes // 10**7), 1) / 100:.2f} GB"
