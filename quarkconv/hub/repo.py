"""The files of a model on the Hub, read by HTTP ranges of one commit; nothing is stored on disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from quarkconv.errors import HubError
from quarkconv.files.base import is_inside
from quarkconv.files.http_files import HttpFiles
from quarkconv.files.remote import Entry
from quarkconv.hub.ranges import HubRanges

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_COMMIT: Final = re.compile(r"[0-9a-f]{40,64}")

_log: Final = logging.getLogger(__name__)


class HubRepo(HttpFiles):
    """One commit of a model on the Hub.

    Args:
        repo: ``org/name``.
        commit: its hash, so that later changes of the repo have no effect.
        entries: its files.
    """

    def __init__(self, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(HubRanges(repo, commit, entries), entries)
        self.repo = repo
        self.commit = commit


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
        "The Hub's list of files is invalid",
        file=repo,
        expected=expected,
        found=found,
        hint="a mirror may omit fields: set HF_ENDPOINT to another, or download the model with `hf download`",
    )
