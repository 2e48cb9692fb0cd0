"""The folders of ranks in a directory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quarkconv.errors import UsageError
from quarkconv.headers.file_names import MANIFEST_NAME
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.plan.plan import Plan
from quarkconv.write.durable import part_of, write_durably, writing
from quarkconv.write.locks import lock_folder
from quarkconv.write.output_directory import create_directory
from quarkconv.write.space import allocated, records_nbytes, require_space

FOLDER: Final = re.compile(r"rank-\d{2,}-of-\d{2,}")
"""Names of the folders of ranks."""


@dataclass(frozen=True, slots=True)
class RankFolders:
    """A directory with a folder for each rank, as :class:`quarkconv.write.ranks.RanksOutput`."""

    directory: Path

    def prepare(self, plans: Sequence[Plan], unfinished: Sequence[Plan], *, overwrite: bool) -> None:
        """Create the directory, or check that it may be used, and that the ranks fit on the disk."""
        with writing(self.directory), ExitStack() as locks:
            obsolete = self._obsolete(plans, overwrite=overwrite)
            self._require_space(unfinished, obsolete)
            for path in obsolete:
                if (path / STAGING_NAME).is_dir():
                    descriptor, _ = lock_folder(path / STAGING_NAME)
                    locks.callback(os.close, descriptor)
            for path in obsolete:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def write_index(self, data: bytes) -> None:
        """Write the index, durably."""
        with writing(self.directory):
            write_durably(self.directory / RANKS_NAME, data)

    def _obsolete(self, plans: Sequence[Plan], *, overwrite: bool) -> list[Path]:
        """The files and folders of earlier runs that are in the way and may be deleted."""
        create_directory(self.directory)
        folders = {plan.rank.folder() for plan in plans}
        present = sorted(self.directory.iterdir())
        obsolete = [path for path in present if path.name == RANKS_NAME or _is_rank(path)] if overwrite else []
        obsolete += [path for path in present if path == part_of(self.directory / RANKS_NAME)]  # of a crash
        for path in present:
            if path not in obsolete and path.name not in folders:
                raise something_else(str(self.directory), path.name)
        return obsolete

    def _require_space(self, plans: Sequence[Plan], obsolete: Sequence[Path]) -> None:
        """Check the space for all ranks before the first is written, and before anything is deleted."""
        needed = sum(plan.output_bytes + records_nbytes(plan.shards) for plan in plans)
        folders = [*obsolete, *(self.directory / plan.rank.folder() for plan in plans)]
        reclaimed = {path for folder in folders for path in folder.rglob("*")}
        require_space(self.directory, needed, allocated(reclaimed))


def something_else(output: str, found: str) -> UsageError:
    return UsageError(
        "The output has other files",
        file=output,
        expected="a new or empty directory, or an unfinished conversion by rank",
        found=found,
        hint="give another --out, or --overwrite to replace an earlier conversion by rank",
    )


def _is_rank(path: Path) -> bool:
    """True of a folder that an earlier conversion by rank wrote, finished or not."""
    written = (path / MANIFEST_NAME).is_file() or (path / STAGING_NAME).is_dir()
    return written and FOLDER.fullmatch(path.name) is not None and not path.is_symlink()
