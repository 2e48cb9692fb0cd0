"""From the name of a model to its files: a directory, a URL, a snapshot in the Hub's cache, or a repo."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from quarkconv.errors import HubError, UsageError, WriteError
from quarkconv.files.base import Files
from quarkconv.files.local import LocalFiles
from quarkconv.files.urls import BUCKETS, MODELSCOPE, SCHEMES, is_store_url, is_url
from quarkconv.progress import SILENT, Progress
from quarkconv.text import alternatives

if TYPE_CHECKING:
    from quarkconv.hub.repo import HubRepo

_REPO: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?", re.ASCII)
_PAGE: Final = re.compile(
    r"(https?://(huggingface\.co|hf\.co)|hf:/)/(?!datasets/|spaces/)(models/)?(?P<repo>[^/]+/[^/?#]+)"
)
_LISTING_RETRIES: Final = 3
_DISK_ERRORS: Final = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EFBIG,
        errno.ENOTDIR,
    )
)


class Located(NamedTuple):
    """A model that was found.

    Attributes:
        files: its files, not read yet.
        repo: its Hub repo id, without revision; None outside the Hub.
        name: for outputs, where the model is not a directory.
    """

    files: Files
    repo: str | None = None
    name: str | None = None

    @property
    def directory(self) -> Path | None:
        """The directory that holds the files; None when they are remote."""
        return self.files.root if isinstance(self.files, LocalFiles) else None

    @property
    def origin(self) -> Path | str:
        """The directory, or the URL or ``org/name@commit`` of remote files."""
        return self.directory or str(self.files)


def locate(model: str | Path, *, cache: bool = False, progress: Progress = SILENT) -> Located:
    """Find the files of a model.

    Args:
        model: a local directory, or a Hub repo id ``org/name`` or ``org/name@revision``. An existing path is never
            looked up on the Hub. A complete snapshot of the commit in the Hub's cache is used instead of the Hub.
            Or a URL: of an object store (``s3://``, ``gs://``, ``az://``), of a bucket of the Hub
            (``hf://buckets/``), or ``modelscope://org/name``.
        cache: download the model to the Hub's cache instead of reading it from the Hub.
        progress: receives the listing of the repo and the download.

    Raises:
        UsageError: the name is empty; the model is a URL, and ``cache`` is set; or the URL is invalid, or of a service
            that is not read.
        SourceError: the object store cannot be read.
        HubError: the model is a repo id, and the Hub does not have it or cannot be reached.
        WriteError: the cache cannot be written to.
    """
    if model == "":
        raise UsageError(
            "The model name is empty",
            expected="a directory, a Hub repo id, or a URL",
            hint="give . for the current directory",
        )
    if isinstance(model, str) and is_url(model):
        if cache:
            raise UsageError(
                "A model from a URL cannot be downloaded",
                file=model,
                expected="`inspect`, or `convert` without --cache",
                hint="copy it to a directory with the service's own tools",
            )
        return Located(_open_url(model), name=model.rstrip("/").rpartition("/")[2].partition("@")[0])
    if not isinstance(model, str) or not _REPO.fullmatch(model) or _exists(model):
        return Located(LocalFiles(Path(model)))
    repo, _, revision = model.partition("@")
    find = _download if cache else _remote
    try:
        return Located(find(repo, revision or None, progress), repo, repo.rpartition("/")[2])
    except HubError as error:
        folder, name = os.path.split(model)
        if os.path.isdir(folder):  # a misspelled path
            error.hint = f"check the name: the directory {folder} has no {name}"
        raise


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # it lies in a folder that may not be searched
        return True


def _open_url(url: str) -> Files:
    """List the files of a model that has a URL."""
    if url.startswith(BUCKETS):
        from quarkconv.hub.buckets import open_hub_bucket

        return open_hub_bucket(url)
    if url.startswith(MODELSCOPE):
        from quarkconv.modelscope.repo import open_modelscope

        return open_modelscope(url)
    if is_store_url(url):
        from quarkconv.cloud.bucket import open_bucket

        return open_bucket(url)
    page = _PAGE.match(url)
    raise UsageError(
        "quarkconv does not read models from this URL",
        expected=f"a directory, a Hub repo id, or a URL: {alternatives((*SCHEMES, BUCKETS, MODELSCOPE))}",
        found=repr(url)[:300],
        hint=f"give the repo id: {page['repo']}" if page else "download the model, and give its directory",
    )


def check_repo_id(repo: str) -> None:
    """Require the form of a repo id, without revision.

    Raises:
        UsageError: ``repo`` has another form.
    """
    if is_url(repo):
        raise UsageError(
            "Uploads go to repos on the Hub",
            expected="org/name",
            found=repr(repo)[:100],
            hint="convert to a directory or an object store, and upload with the service's own tools",
        )
    if not _REPO.fullmatch(repo) or "@" in repo:
        raise UsageError("Invalid repo id", expected="org/name", found=repr(repo)[:100])


def _remote(repo: str, revision: str | None, progress: Progress) -> Files:
    """The files of a commit on the Hub, or of its snapshot where that is complete."""
    listed = _listing(repo, revision, progress)
    if isinstance(listed, LocalFiles):
        return listed
    snapshot = _snapshot(repo, listed.commit)
    if snapshot is None or any(snapshot.size(str(path)) != listed.size(str(path)) for path in listed.names()):
        return listed
    import logging

    logging.getLogger(__name__).info("%s is in the cache: %s", listed, snapshot.root)
    return snapshot


def _download(repo: str, revision: str | None, progress: Progress) -> LocalFiles:
    """The snapshot of a commit in the cache, downloaded as far as it is missing."""
    from huggingface_hub import constants, snapshot_download

    from quarkconv.hub.download import missing_bytes, no_bars, progress_bar
    from quarkconv.hub.errors import hub_error

    total = None
    if progress is not SILENT:
        try:
            listed = _listing(repo, revision, progress)
        except HubError:  # only the total is unknown: huggingface_hub may still find the model in the cache
            pass
        else:
            if isinstance(listed, LocalFiles):
                return listed
            total = missing_bytes(listed)
    try:
        if progress is SILENT:
            return LocalFiles(Path(snapshot_download(repo, revision=revision)))
        progress.step("Downloading", total, "byte")
        with no_bars():
            return LocalFiles(Path(snapshot_download(repo, revision=revision, tqdm_class=progress_bar(progress))))
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise WriteError(
                "The model cannot be written to the Hub's cache",
                file=constants.HF_HUB_CACHE,
                found=error.strerror,
                hint="free space there, or set HF_HUB_CACHE to another directory; the same command resumes",
            ) from error
        raise hub_error(error, repo if revision is None else f"{repo}@{revision}") from error


def _listing(repo: str, revision: str | None, progress: Progress) -> HubRepo | LocalFiles:
    """The files of a commit; of its snapshot in the cache where the Hub cannot be reached."""
    from quarkconv.files.http import retried
    from quarkconv.hub.errors import hub_error
    from quarkconv.hub.repo import list_repo

    progress.step("Contacting the Hub")

    def request() -> HubRepo | LocalFiles:
        try:
            return list_repo(repo, revision)
        except Exception as error:
            snapshot = None if _is_response(error) else _snapshot(repo, revision)
            if snapshot is None:
                raise
            return snapshot

    try:
        return retried(request, _listing_pause)
    except HubError:
        raise
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        raise hub_error(error, repo if revision is None else f"{repo}@{revision}") from error


def _is_response(error: Exception) -> bool:
    """Whether the Hub responded: what it refuses is not in the cache either."""
    return isinstance(error, ValueError | HubError) or getattr(error, "response", None) is not None


def _listing_pause(error: Exception, failures: int) -> float | None:
    """Seconds before the listing is requested again; None where another request would fail as well."""
    from quarkconv.files.http import LONGEST_REQUESTED, backoff, client, is_transient, requested_pause

    if isinstance(error, HubError) or failures > _LISTING_RETRIES:
        return None
    response = getattr(error, "response", None)
    if response is not None:
        pause = requested_pause(response.headers) or 0.0
        transient = (response.status_code == 429 or response.status_code >= 500) and pause <= LONGEST_REQUESTED
        return max(pause, backoff(failures)) if transient else None
    # Without a connection there is no Hub: a user without network should not wait for the message.
    unreachable = isinstance(error, client().ConnectError | client().ConnectTimeout)
    return backoff(failures) if is_transient(error) and not unreachable else None


def _snapshot(repo: str, revision: str | None) -> LocalFiles | None:
    """A snapshot in the cache, complete or not."""
    from huggingface_hub import snapshot_download

    try:
        return LocalFiles(Path(snapshot_download(repo, revision=revision, local_files_only=True)))
    except (OSError, ValueError):
        return None
