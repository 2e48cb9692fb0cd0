"""The files of a model on the Hub, read by HTTP ranges of one commit; nothing is stored on disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from quarkconv.errors import HubError
from quarkconv.files.base import Range, in_hidden_folder
from quarkconv.hub.ranges import Entry, HubRanges
from quarkconv.hub.read_ahead import read_ahead

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

CONNECTIONS: Final = 16
"""Concurrent requests."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40,64}")

_log: Final = logging.getLogger(__name__)


class HubRepo:
    """One commit of a model on the Hub.

    Args:
        repo: ``org/name``.
        commit: its hash, so that later changes of the repo have no effect.
        entries: its files.
    """

    def __init__(self, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
        self.repo = repo
        self.commit = commit
        self._entries = dict(entries)
        self._heads: dict[str, bytes] = {}
        self._ranges = HubRanges(repo, commit, self._entries)
        self.pool = ThreadPoolExecutor(max_workers=CONNECTIONS, thread_name_prefix="quarkconv-hub")

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def root(self) -> Path:
        """Repo id and commit, for messages."""
        return Path(str(self))

    def path(self, name: str) -> None:  # noqa: ARG002
        """None: nothing is on disk."""
        return

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every file, including those in hidden folders."""
        return self._entries

    def names(self) -> Iterator[Path]:
        """Every file outside of hidden folders, in the order of :class:`LocalFiles`."""
        for path in sorted(Path(PurePosixPath(name)) for name in self._entries):
            if not in_hidden_folder(path):
                yield path

    def size(self, name: str) -> int | None:
        """Size in bytes; None if the file does not exist."""
        entry = self._entries.get(name)
        return None if entry is None else entry.size

    def etag(self, name: str) -> str:
        """The hash of a file in the listing."""
        return self._entries[name].etag

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends.

        Raises:
            SourceError: the Hub does not serve it, or serves something else.
        """
        end = min(start + nbytes, self._entries[name].size)
        head = self._heads.get(name, b"")
        if end <= len(head):
            return head[start:end]
        return self.fetch(Range(name, start, end))

    def read_many(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Byte ranges one after the other, fetched ahead over several connections."""
        return read_ahead(ranges, self.fetch, self.pool)

    def expect(self, sizes: Mapping[str, int], arrived: Callable[[str], None]) -> None:
        """Fetch the beginnings of some files concurrently, and keep them for :meth:`read`."""
        wanted = {
            name: min(size, self._entries[name].size)
            for name, size in sizes.items()
            if name in self._entries and size > len(self._heads.get(name, b""))
        }

        def rest(name: str) -> bytes:
            head = self._heads.get(name, b"")
            return head + self.fetch(Range(name, len(head), wanted[name]))

        futures = {self.pool.submit(rest, name): name for name in wanted}
        try:
            for future in as_completed(futures):
                self._heads[futures[future]] = future.result()
                arrived(futures[future])
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        if wanted:
            _log.info("%s: %d bytes read in %d requests", self, self._ranges.nbytes, self._ranges.requests)

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Check the ETags of some files on the Hub again.

        Raises:
            SourceError: the ETag or size of one has changed, or it is gone.
        """
        for _ in self.pool.map(self._ranges.locate, names):
            pass

    def fetch(self, wanted: Range) -> bytes:
        """The bytes of a range that lies inside its file; a broken transfer resumes where it broke.

        Raises:
            SourceError: the Hub does not serve them, or serves something else.
        """
        return self._ranges.fetch(wanted)

    def close(self) -> None:
        """Cancel pending requests."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def list_repo(repo: str, revision: str | None) -> HubRepo:
    """Request a commit and the list of its files.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the default branch.

    Raises:
        HubError: the list cannot be used.
        Exception: whatever huggingface_hub raises.
    """
    from huggingface_hub import HfApi, constants

    info: ModelInfo = HfApi(endpoint=constants.ENDPOINT).model_info(
        repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise _no_listing(repo, "a commit", repr(info.sha)[:100])
    entries = {}
    for file in info.siblings or ():
        etag = file.lfs.sha256 if file.lfs else file.blob_id
        if not _is_inside(file.rfilename):
            raise _no_listing(repo, "files inside the repo", repr(file.rfilename)[:300])
        if file.size is None or not etag:
            raise _no_listing(repo, "size and hash of each file", f"neither for {file.rfilename!r:.300}")
        entries[file.rfilename] = Entry(file.size, etag)
    _log.info(
        "%s is commit %s: %d files, %d bytes", repo, info.sha, len(entries), sum(e.size for e in entries.values())
    )
    return HubRepo(repo, info.sha, entries)


def _is_inside(name: str) -> bool:
    """Whether a name is a plain path inside a repo: a conversion creates files of the same names."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and "\0" not in name and "\\" not in name


def _no_listing(repo: str, expected: str, found: str) -> HubError:
    return HubError(
        "The Hub's list of files cannot be used",
        file=repo,
        expected=expected,
        found=found,
        hint="a mirror may omit fields: set HF_ENDPOINT to another, or download the model with `hf download`",
    )
