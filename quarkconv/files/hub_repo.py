"""The files of a model on the Hub, read by HTTP ranges of one commit; nothing is kept on disk.

Addresses, tokens, endpoints, proxies, redirects, rate limits and retries are huggingface_hub's. What is added is that
nothing is believed: a range is taken only if the answer says that it is the one that was asked for, of a file of the
size that the listing gave, and under the ETag that the file had first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from quarkconv.errors import HubError, SourceError
from quarkconv.files.files import Range, in_hidden_folder
from quarkconv.files.hub_errors import hub_error
from quarkconv.files.read_ahead import read_ahead

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

CONNECTIONS: Final = 16
"""Requests that are under way at the same time."""
RETRIES: Final = 5
"""Times that a request is made again, and that a broken transfer goes on where it broke, before it fails."""
FIRST_WAIT: Final = 1.0
"""Seconds before the first of them; it doubles each time."""
_LONGEST_WAIT: Final = 8.0
_EXPIRED: Final = (400, 401, 403, 404, 410)  # what stores say to an address whose signature is too old


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the listing of a commit: size in bytes, and its hash, which the Hub also gives as ETag."""

    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class _Location:
    """Where the bytes of a file are: at the Hub itself, or behind an address that it signed for a while."""

    url: str
    at_hub: bool


class HubRepo:
    """One commit of a model on the Hub.

    Args:
        repo: ``org/name``.
        commit: its hash, so that no later change is seen.
        entries: its files.
    """

    def __init__(self, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
        self.repo = repo
        self.commit = commit
        self._entries = dict(entries)
        self._heads: dict[str, bytes] = {}
        self._locations: dict[str, _Location] = {}
        self._etags: dict[str, str] = {}
        self._lock = threading.Lock()
        self.pool = ThreadPoolExecutor(max_workers=CONNECTIONS, thread_name_prefix="quarkconv-hub")

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def root(self) -> Path:
        """The name of the repo and the commit, for people."""
        return Path(str(self))

    def path(self, name: str) -> None:  # noqa: ARG002
        """None: nothing is on disk."""
        return

    def names(self) -> Iterator[Path]:
        """Every file that lies in no hidden folder, in the order that :class:`LocalFiles` gives."""
        for path in sorted(Path(PurePosixPath(name)) for name in self._entries):
            if not in_hidden_folder(path):
                yield path

    def size(self, name: str) -> int | None:
        """Size in bytes; None where there is no such file."""
        entry = self._entries.get(name)
        return None if entry is None else entry.size

    def etag(self, name: str) -> str:
        """The hash of a file in the listing."""
        return self._entries[name].etag

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends.

        Raises:
            SourceError: the Hub does not give it, or gives something else.
        """
        end = min(start + nbytes, self._entries[name].size)
        head = self._heads.get(name, b"")
        if end <= len(head):
            return head[start:end]
        return self.fetch(Range(name, start, end))

    def read_many(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Byte ranges one after the other, fetched ahead over several connections."""
        return read_ahead(ranges, self.fetch, self.pool)

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Fetch the beginnings of some files, all at the same time, and keep them for :meth:`read`."""
        wanted = {
            name: min(size, self._entries[name].size)
            for name, size in sizes.items()
            if name in self._entries and size > len(self._heads.get(name, b""))
        }

        def rest(name: str) -> bytes:
            head = self._heads.get(name, b"")
            return head + self.fetch(Range(name, len(head), wanted[name]))

        for name, data in zip(wanted, self.pool.map(rest, wanted), strict=True):
            self._heads[name] = data

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Ask the Hub again for the ETag of some files.

        Raises:
            SourceError: one has another ETag or size, or is gone.
        """
        for _ in self.pool.map(self._locate, names):
            pass

    def fetch(self, wanted: Range) -> bytes:
        """The bytes of a range that lies inside its file; a broken transfer goes on where it broke.

        Raises:
            SourceError: the Hub does not give them, or gives something else.
        """
        data = bytearray()
        failures = 0
        while len(data) < wanted.end - wanted.start:
            before = len(data)
            try:
                self._transfer(Range(wanted.file, wanted.start + before, wanted.end), data)
                continue
            except _transport_error() as error:
                broken = error
            if len(data) > before:
                failures = 0
            failures += 1
            if failures > RETRIES:
                raise hub_error(broken, str(self), wanted.file) from broken
            time.sleep(min(FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT))
        return bytes(data)

    def close(self) -> None:
        """Drop what is under way."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _transfer(self, wanted: Range, data: bytearray) -> None:
        """Append what one request gives of a range."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        name, start, end = wanted
        for fresh in (False, True):
            location = self._locate(name) if fresh else self._locations.get(name) or self._locate(name)
            headers = build_hf_headers(token=None if location.at_hub else False)
            headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            try:
                with http_stream_backoff(
                    "GET", location.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    max_retries=RETRIES, base_wait_time=FIRST_WAIT, retry_on_exceptions=(),
                ) as response:  # fmt: skip
                    if response.status_code in _EXPIRED and not (location.at_hub or fresh):
                        continue
                    hf_raise_for_status(response)
                    self._check_answer(name, start, end, response)
                    for chunk in response.iter_bytes():
                        data += chunk[: end - start]
                        start += len(chunk)
            except HfHubHTTPError as error:
                raise hub_error(error, str(self), name) from error
            return

    def _locate(self, name: str) -> _Location:
        """Ask the Hub where a file is, and compare its ETag and size with the listing's."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=constants.ENDPOINT)
        try:
            found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, retry_on_errors=True)
        except (HfHubHTTPError, _transport_error()) as error:
            raise hub_error(error, str(self), name) from error
        entry = self._entries[name]
        if found.etag != entry.etag or found.size not in (None, entry.size):
            raise self._changed(
                name, f"ETag {entry.etag}, {entry.size} bytes", f"ETag {found.etag}, {found.size} bytes"
            )
        location = _Location(found.location, _same_server(found.location, url))
        with self._lock:
            self._locations[name] = location
        return location

    def _check_answer(self, name: str, start: int, end: int, response: Any) -> None:
        """Raise unless an answer is (the beginning of) the range that was asked for."""
        size = self._entries[name].size
        stated = response.headers.get("Content-Range", "")
        whole = response.status_code == 200 and (start, end) == (0, size)
        if not whole and not _is_range(stated, start, end, size):
            raise HubError(
                "The Hub answered with other bytes than those that were asked for", file=f"{self}/{name}",
                expected=f"bytes {start}-{end - 1}/{size}",
                found=f"status {response.status_code}, Content-Range {stated or 'missing'}",
                hint="a proxy or mirror may not know ranges: set HF_ENDPOINT to another, or use --cache",
            )  # fmt: skip
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            with self._lock:
                first = self._etags.setdefault(name, etag)
            if etag != first:
                raise self._changed(name, f"ETag {first}", f"ETag {etag}")

    def _changed(self, name: str, expected: str, found: str) -> SourceError:
        return SourceError(
            "A file on the Hub is not the one that was listed", code="source-changed", file=f"{self}/{name}",
            expected=expected, found=found, hint="give the command again; with --overwrite if it was begun before",
        )  # fmt: skip


def list_repo(repo: str, revision: str | None) -> HubRepo:
    """Ask the Hub for a commit and its files.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the default branch.

    Raises:
        Exception: whatever huggingface_hub raises.
    """
    from huggingface_hub import HfApi, constants

    info: ModelInfo = HfApi(endpoint=constants.ENDPOINT).model_info(
        repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    entries = {
        file.rfilename: Entry(file.size or 0, (file.lfs.sha256 if file.lfs else file.blob_id) or "")
        for file in info.siblings or ()
    }
    if info.sha is None:
        raise HubError("The Hub gave no commit for this repo", file=repo, hint="give the command again")
    return HubRepo(repo, info.sha, entries)


def _is_range(stated: str, start: int, end: int, size: int) -> bool:
    """Whether a Content-Range starts at ``start``, ends at ``end`` or before, and is of a file of ``size`` bytes."""
    unit, _, rest = stated.strip().partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdecimal() and last.isdecimal() and total.isdecimal()):
        return False
    return int(first) == start <= int(last) < end and int(total) == size


def _same_server(one: str, other: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(one)[:2] == urlsplit(other)[:2]


@cache
def _transport_error() -> type[Exception]:
    """The root of the errors of the HTTP client that huggingface_hub uses: httpx, from its version 2 on httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]
