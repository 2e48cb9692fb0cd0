"""The files of a model on the Hub, read by HTTP ranges of one commit; nothing is stored on disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from quarkconv.errors import HubError
from quarkconv.files.base import Range
from quarkconv.files.remote import Entry, RemoteFiles, is_inside
from quarkconv.hub.ranges import HubRanges

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_COMMIT: Final = re.compile(r"[0-9a-f]{40,64}")

_log: Final = logging.getLogger(__name__)


class HubRepo(RemoteFiles):
    """One commit of a model on the Hub.

    Args:
        repo: ``org/name``.
        commit: its hash, so that later changes of the repo have no effect.
        entries: its files.
    """

    def __init__(self, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.repo = repo
        self.commit = commit
        self._ranges = HubRanges(repo, commit, self.entries)

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    def fetch(self, requested: Range) -> bytes:
        """The bytes of a range that lies inside its file; a broken transfer resumes where it broke.

        Raises:
            SourceError: the Hub does not serve them, or serves something else.
        """
        return self._ranges.fetch(requested)

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Check the ETags of some files on the Hub again.

        Raises:
            SourceError: the ETag or size of one has changed, or it is gone.
        """
        for _ in self.pool.map(self._ranges.locate, names):
            pass

    def traffic(self) -> tuple[int, int]:
        """Bytes read, and requests made."""
        return self._ranges.nbytes, self._ranges.requests


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
        if not is_inside(file.rfilename):
            raise _no_listing(repo, "files inside the repo", repr(file.rfilename)[:300])
        if file.size is None or not etag:
            raise _no_listing(repo, "size and hash of each file", f"neither for {file.rfilename!r:.300}")
        entries[file.rfilename] = Entry(file.size, etag)
    _log.info(
        "%s is commit %s: %d files, %d bytes", repo, info.sha, len(entries), sum(e.size for e in entries.values())
    )
    return HubRepo(repo, info.sha, entries)


def _no_listing(repo: str, expected: str, found: str) -> HubError:
    return HubError(
        "The Hub's list of files cannot be used",
        file=repo,
        expected=expected,
        found=found,
        hint="a mirror may omit fields: set HF_ENDPOINT to another, or download the model with `hf download`",
    )
