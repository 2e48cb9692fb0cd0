"""From the name of a model to its files: a directory, a snapshot in the Hub's cache, or a repo read from afar."""

from __future__ import annotations

import errno
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quarkconv.errors import HubError, WriteError
from quarkconv.files.base import Files, Progress, Reading
from quarkconv.files.local import LocalFiles

if TYPE_CHECKING:
    from quarkconv.hub.repo import HubRepo

_REPO: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?", re.ASCII)
_LISTING_RETRIES: Final = 3
_OF_DISKS: Final = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR,
)  # fmt: skip


def locate_model(model: str | Path | Files, *, cache: bool = False, reading: Progress | None = None) -> Files:
    """The files of a model, none of which is read yet.

    Args:
        model: a local directory, or a Hub repo id ``org/name`` or ``org/name@revision``. What exists on disk is never
            looked up on the Hub; a whole snapshot of the wanted commit in the Hub's cache is used instead of the Hub.
            Files that were located before are returned as they are.
        cache: download what is not in the cache to it, rather than read it from the Hub.
        reading: told that the Hub is asked, and how the download gets on.

    Raises:
        HubError: it is a repo id, and the Hub does not have it or cannot be asked.
    """
    if not isinstance(model, str | Path):
        return model
    repo = _repo_id(model)
    if repo is None:
        return LocalFiles(Path(model))
    if cache:
        return LocalFiles(resolve_model(model, reading))
    name, _, revision = repo.partition("@")
    listed = _listing(name, revision or None, reading)
    if isinstance(listed, Path):
        return LocalFiles(listed)
    snapshot = _snapshot(name, listed.commit)
    whole = snapshot is not None and all(LocalFiles(snapshot).size(str(path)) == listed.size(str(path))
                                         for path in listed.names())  # fmt: skip
    if snapshot is None or not whole:
        return listed
    import logging

    logging.getLogger(__name__).info("%s is in the cache: %s", listed, snapshot)
    return LocalFiles(snapshot)


def resolve_model(model: str | Path, reading: Progress | None = None) -> Path:
    """The directory of a model.

    Args:
        model: a local directory, or a Hub repo id ``org/name`` or ``org/name@revision``. What exists on disk is never
            looked up on the Hub. A repo that is not in the cache is downloaded to it.
        reading: told how the download gets on, in place of the bars that huggingface_hub shows.

    Raises:
        HubError: it is a repo id, and the Hub does not have it or cannot be asked.
        WriteError: the cache cannot be written to.
    """
    repo = _repo_id(model)
    if repo is None:
        return Path(model)
    from huggingface_hub import constants, snapshot_download

    from quarkconv.hub.download import counted, missing_bytes, no_bars
    from quarkconv.hub.errors import hub_error

    name, _, revision = repo.partition("@")
    bars = None
    if reading is not None:
        try:
            listed = _listing(name, revision or None, reading)
        except HubError:  # the list is for the total alone: huggingface_hub may still find the model in the cache
            bars = counted(reading, None)
        else:
            if isinstance(listed, Path):
                return listed
            bars = counted(reading, missing_bytes(listed))
    try:
        with nullcontext() if bars is None else no_bars():
            return Path(snapshot_download(name, revision=revision or None, tqdm_class=bars))
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        if isinstance(error, OSError) and error.errno in _OF_DISKS:
            raise WriteError(
                "The model cannot be written to the Hub's cache", file=constants.HF_HUB_CACHE, found=error.strerror,
                hint="make room there, or name another folder in HF_HUB_CACHE; the same command goes on",
            ) from error  # fmt: skip
        raise hub_error(error, repo) from error


def _repo_id(model: str | Path) -> str | None:
    """The repo id that a model's name is; None where it is a path."""
    return model if isinstance(model, str) and _REPO.fullmatch(model) and not Path(model).exists() else None


def _listing(repo: str, revision: str | None, reading: Progress | None) -> HubRepo | Path:
    """The files of a commit; a snapshot of it in the cache where the Hub cannot be asked."""
    from quarkconv.hub.errors import hub_error
    from quarkconv.hub.http import wait_before
    from quarkconv.hub.repo import list_repo

    if reading is not None:
        reading(Reading("list", 0, None, in_bytes=False))
    place = repo if revision is None else f"{repo}@{revision}"
    for attempt in range(1, _LISTING_RETRIES + 2):
        try:
            return list_repo(repo, revision)
        except HubError:
            raise
        except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
            answered = getattr(error, "response", None) is not None
            if not answered and not isinstance(error, ValueError):
                snapshot = _snapshot(repo, revision)
                if snapshot is not None:
                    return snapshot
            wait = _wait(error, answered=answered)
            if wait is None or attempt > _LISTING_RETRIES:
                raise hub_error(error, place) from error
            time.sleep(max(wait, wait_before(attempt)))
    raise AssertionError("the last attempt returns or raises")  # pragma: no cover


def _wait(error: Exception, *, answered: bool) -> float | None:
    """Seconds that the Hub wants to wait before it is asked again; None where asking again would be in vain."""
    from quarkconv.hub.http import LONGEST_ASKED, client, may_pass, wait_asked_for

    if answered:
        response = error.response  # type: ignore[attr-defined]
        asked = wait_asked_for(response.headers) or 0.0
        passes = response.status_code == 429 or response.status_code >= 500
        return asked if passes and asked <= LONGEST_ASKED else None
    # What cannot even be connected to is not there: whoever has no network should not wait to be told.
    return 0.0 if may_pass(error) and not isinstance(error, client().ConnectError | client().ConnectTimeout) else None


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """A snapshot in the cache, whole or not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
