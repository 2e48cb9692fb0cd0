"""Byte ranges of one commit of a repo on the Hub, over connections that break and to addresses that expire.

Addresses, tokens, endpoints, proxies, redirects, rate limits and retries are huggingface_hub's. What is added is that
nothing is believed: a range is taken only if the answer says that it is the one that was asked for, of a file of the
size that the listing gave, and under the ETag that the file had first. Files in Xet storage are read as any others are:
the redirect leads to a server that puts them together, and gives ranges.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from quarkconv.errors import HubError, SourceError
from quarkconv.files.base import Range
from quarkconv.hub import http
from quarkconv.hub.errors import hub_error
from quarkconv.hub.http import RETRIES, may_pass, wait_before

REFUSALS: Final = 2
"""Times that a store is asked again, under a new address, after it refused one that the Hub had just signed."""
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


class HubRanges:
    """Reads ranges of the files of one commit. Used by several threads.

    Args:
        repo: ``org/name``.
        commit: its hash.
        entries: its files.
    """

    def __init__(self, repo: str, commit: str, entries: Mapping[str, Entry]) -> None:
        self._repo = repo
        self._commit = commit
        self._entries = entries
        self._locations: dict[str, _Location] = {}
        self._etags: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self.requests = 0
        self.nbytes = 0

    def __str__(self) -> str:
        return f"{self._repo}@{self._commit}"

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
                if len(data) > before:
                    failures = 0
                    continue
                broken: Exception = self._empty(wanted)
            except http.client().HTTPError as error:
                broken = error
            failures = 1 if len(data) > before else failures + 1
            if failures > _patience(broken):
                if isinstance(broken, HubError):
                    raise broken
                raise hub_error(broken, str(self), wanted.file) from broken
            time.sleep(wait_before(failures))
        return bytes(data)

    def locate(self, name: str) -> _Location:
        """Ask the Hub where a file is.

        Raises:
            SourceError: it has another ETag, size or commit than the listing said, or is gone.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self._repo, name, revision=self._commit, endpoint=constants.ENDPOINT)
        attempt = 0
        while True:
            attempt += 1
            self._count()
            try:
                found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, retry_on_errors=True)
                break
            except (http.client().HTTPError, RecursionError) as error:
                # huggingface_hub has tried several times already, but for errors of a proxy
                if attempt > RETRIES or not (isinstance(error, http.client().ProxyError) and may_pass(error)):
                    raise hub_error(error, str(self), name) from error
            time.sleep(wait_before(attempt))
        entry = self._entries[name]
        if (
            found.etag != entry.etag
            or found.size not in (None, entry.size)
            or found.commit_hash not in (None, self._commit)
        ):
            raise self._changed(
                name, f"ETag {entry.etag}, {entry.size} bytes, commit {self._commit}",
                f"ETag {found.etag}, {found.size} bytes, commit {found.commit_hash}",
            )  # fmt: skip
        place = urljoin(url, found.location)
        location = _Location(place, _server(place) == _server(url))
        with self._lock:
            self._locations[name] = location
        return location

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
            location = self.locate(name) if fresh else self._locations.get(name) or self.locate(name)
            headers = build_hf_headers(token=None if location.at_hub else False)
            headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            self._count()
            try:
                with http_stream_backoff(
                    "GET", location.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    max_retries=RETRIES, base_wait_time=http.FIRST_WAIT, retry_on_exceptions=(),
                ) as response:  # fmt: skip
                    expired = response.status_code in _EXPIRED and not location.at_hub
                    if expired and not fresh:
                        continue
                    if response.status_code != 416:
                        hf_raise_for_status(response)
                    self._check_answer(name, start, end, response)
                    self._take(response, end - start, data)
            except HfHubHTTPError as error:
                if not location.at_hub and error.response.status_code in _EXPIRED:
                    raise  # stores refuse now and then what they give a moment later
                raise hub_error(error, str(self), name) from error
            return

    def _take(self, response: Any, room: int, data: bytearray) -> None:
        """Append the body of an answer, as it came over the line, and no more of it than was asked for."""
        before = len(data)
        try:
            for chunk in response.iter_raw():
                data += chunk[:room]
                room -= len(chunk)
                if room < 0:  # whoever sends more than was asked for may never end
                    return
        finally:
            with self._lock:
                self.nbytes += len(data) - before

    def _check_answer(self, name: str, start: int, end: int, response: Any) -> None:
        """Raise unless an answer is (the beginning of) the range that was asked for."""
        size = self._entries[name].size
        stated = response.headers.get("Content-Range", "")
        coding = response.headers.get("Content-Encoding", "")
        whole = response.status_code == 200 and (start, end) == (0, size)
        plain = coding.strip().lower() in ("", "identity")
        if not plain or not (whole or (response.status_code == 206 and _is_range(stated, start, end, size))):
            raise HubError(
                "The Hub answered with other bytes than those that were asked for", file=f"{self}/{name}",
                expected=f"bytes {start}-{end - 1}/{size}",
                found=f"status {response.status_code}, Content-Range {stated or 'missing'}"
                + ("" if plain else f", Content-Encoding {coding}"),
                hint="a proxy or mirror may not know ranges: set HF_ENDPOINT to another, or use --cache",
            )  # fmt: skip
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            with self._lock:  # each store has its own ETags, and the Hub may send us to another one next time
                first = self._etags.setdefault((name, _server(str(response.url))), etag)
            if etag != first:
                raise self._changed(name, f"ETag {first}", f"ETag {etag}")

    def _count(self) -> None:
        with self._lock:
            self.requests += 1

    def _empty(self, wanted: Range) -> HubError:
        return HubError(
            "The Hub's answers end before the range does", file=f"{self}/{wanted.file}",
            expected=f"bytes {wanted.start}-{wanted.end - 1}", found="answers without a byte",
            hint="a proxy or mirror may be broken: set HF_ENDPOINT to another, or use --cache",
        )  # fmt: skip

    def _changed(self, name: str, expected: str, found: str) -> SourceError:
        return SourceError(
            "A file on the Hub is not the one that was listed", code="source-changed", file=f"{self}/{name}",
            expected=expected, found=found, hint="give the command again; with --overwrite if it was begun before",
        )  # fmt: skip


def _patience(error: Exception) -> int:
    """Times that a request is made again after it failed so."""
    if getattr(error, "response", None) is not None:
        return REFUSALS
    return RETRIES if isinstance(error, HubError) or may_pass(error) else 0


def _is_range(stated: str, start: int, end: int, size: int) -> bool:
    """Whether a Content-Range starts at ``start``, ends at ``end`` or before, and is of a file of ``size`` bytes."""
    unit, _, rest = stated.strip().partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdecimal() and last.isdecimal() and total.isdecimal()):
        return False
    return int(first) == start <= int(last) < end and int(total) == size


def _server(url: str) -> str:
    """Scheme, name and port."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
