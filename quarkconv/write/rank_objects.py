"""The folders of ranks below the URL of an object store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quarkconv.cloud.objects import Objects
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.plan.plan import Plan
from quarkconv.write.earlier_objects import Earlier, earlier_objects
from quarkconv.write.rank_folders import FOLDER, something_else


@dataclass(frozen=True, slots=True)
class RankObjects:
    """A URL below which each rank has a folder, as :class:`quarkconv.write.ranks.RanksOutput`."""

    url: str

    def prepare(self, plans: Sequence[Plan], unfinished: Sequence[Plan], *, overwrite: bool) -> None:  # noqa: ARG002
        """Check that there is nothing else below the URL; with ``overwrite``, delete what quarkconv wrote there."""
        objects = Objects(self.url)
        entries = objects.entries()
        folders = {plan.rank.folder() for plan in plans}
        obsolete: list[Earlier] = []
        for name in sorted({name.partition("/")[0] for name in entries}):
            is_rank = FOLDER.fullmatch(name) is not None and name not in entries
            if overwrite and is_rank:
                inside = {
                    path.partition("/")[2]: entry for path, entry in entries.items() if path.startswith(f"{name}/")
                }
                obsolete.append(earlier_objects(Objects(f"{self.url}/{name}"), inside))
            elif not (overwrite and name == RANKS_NAME) and not (is_rank and name in folders):
                raise something_else(self.url, name)
        if overwrite and RANKS_NAME in entries:
            objects.delete([RANKS_NAME])
        for earlier in obsolete:
            earlier.delete()

    def write_index(self, data: bytes) -> None:
        """Write the index."""
        Objects(self.url).put(RANKS_NAME, data)
