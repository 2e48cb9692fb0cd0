"""The files of a model on ModelScope, read by HTTP ranges; nothing is stored on disk.

    GET /api/v1/models/ORG/NAME/repo/files?Revision=REVISION&Recursive=True

lists them with size and SHA-256. It names no commit, so that a revision is pinned by the hashes of its files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from quarkconv.errors import HubError, UsageError
from quarkconv.files.base import is_inside
from quarkconv.files.http_files import HttpFiles
from quarkconv.files.remote import Entry
from quarkconv.files.urls import MODELSCOPE, without_slash
from quarkconv.modelscope.errors import ENDPOINT_HINT, failure, refusal
from quarkconv.modelscope.ranges import SHA256, ModelScopeRanges, endpoint, request

DEFAULT_REVISION: Final = "master"
MOST_ENTRIES: Final = 3000
"""A listing of so many files and folders is cut off: REPO_FILES_TRUNCATION_LIMIT of modelscope_hub."""
_REPO: Final = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)

_log: Final = logging.getLogger(__name__)


class ModelScopeRepo(HttpFiles):
    """One revision of a model on ModelScope. Made by :func:`open_modelscope`."""

    _ranges: ModelScopeRanges

    def __init__(self, repo: str, revision: str, url: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(ModelScopeRanges(repo, revision, url, entries), entries)
        self._repo = repo
        self._revision = revision
        self._url = url

    def check_unchanged(self, names: Iterable[str]) -> None:
        """List the files again, and compare the hashes of some.

        Raises:
            SourceError: the hash or size of one has changed, or it is gone.
        """
        self._ranges.count()
        now = _list(self._repo, self._revision, self._url)
        for name in names:
            if now.get(name) != self.entries[name]:
                raise self._ranges.refuse(name, self.entries[name], now.get(name))


def open_modelscope(url: str) -> ModelScopeRepo:
    """List the files of a model on ModelScope.

    Args:
        url: ``modelscope://org/name`` or ``modelscope://org/name@revision``; without a revision, ``master``.

    Raises:
        UsageError: the URL is invalid.
        HubError: ModelScope cannot be reached, refuses, or has no such model.
    """
    url = without_slash(url)
    match = _REPO.fullmatch(url.removeprefix(MODELSCOPE))
    if match is None:
        raise UsageError(
            "Invalid name of a model on ModelScope",
            expected="modelscope://org/name or modelscope://org/name@revision",
            found=repr(url)[:300],
        )
    revision = match["revision"] or DEFAULT_REVISION
    entries = _list(match["repo"], revision, url)
    if not entries:
        raise HubError(
            "The model has no files",
            file=url,
            expected="config.json and *.safetensors",
            hint="check the name and the revision: modelscope://org/name@revision",
        )
    _log.info("%s: %d files, %d bytes", url, len(entries), sum(entry.size for entry in entries.values()))
    return ModelScopeRepo(match["repo"], revision, url, entries)


def _list(repo: str, revision: str, url: str) -> dict[str, Entry]:
    """The files of a revision by their names.

    Raises:
        HubError: ModelScope cannot be reached, refuses, or lists something else than files.
    """
    try:
        response = request(
            "GET",
            f"{endpoint()}/api/v1/models/{repo}/repo/files",
            params={"Revision": revision, "Recursive": "True"},
        )
        response.raise_for_status()
        body = response.json()
    except Exception as error:  # of the HTTP client, OSError, ValueError
        raise failure(error, url) from error
    files = _files(body, url)
    if len(files) >= MOST_ENTRIES:
        raise HubError(
            "ModelScope does not list all files of this model",
            file=url,
            expected=f"fewer than {MOST_ENTRIES} files and folders",
            found=str(len(files)),
            hint="download the model with `modelscope download`",
        )
    return dict(_entry(item, url) for item in files if not (isinstance(item, dict) and item.get("Type") == "tree"))


def _files(body: object, url: str) -> list[object]:
    data = body.get("Data") if isinstance(body, dict) else None
    if isinstance(body, dict) and body.get("Code", 200) != 200:  # with status 200 as well
        raise refusal(404, str(body.get("Message"))[:300], url)
    files = data.get("Files") if isinstance(data, dict) else data
    if not isinstance(files, list):
        raise _unusable(url, "no list of files")
    return files


def _entry(item: object, url: str) -> tuple[str, Entry]:
    """Name, size and SHA-256 of a listed file."""
    fields: dict[str, Any] = item if isinstance(item, dict) else {}
    name, size, sha256 = fields.get("Path"), fields.get("Size"), str(fields.get("Sha256")).lower()
    if not isinstance(name, str) or not is_inside(name):
        raise _unusable(url, repr(name)[:300])
    if type(size) is not int or size < 0 or not SHA256.fullmatch(sha256):
        raise _unusable(url, f"neither for {name!r:.300}" if size is None else f"no SHA-256 for {name!r:.300}")
    return name, Entry(size, sha256)


def _unusable(url: str, found: str) -> HubError:
    return HubError(
        "ModelScope's list of files is invalid",
        file=url,
        expected="relative path, size and SHA-256 of each file",
        found=found,
        hint=f"{ENDPOINT_HINT}, or download the model with `modelscope download`",
    )
