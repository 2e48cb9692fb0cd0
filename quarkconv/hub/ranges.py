"""Byte ranges of one commit of a repo on the Hub, over connections that break and URLs that expire.

huggingface_hub handles URLs, tokens, endpoints, proxies, redirects and rate limits. Added here: every response is
checked. A range is accepted only if the response states the requested range, of a file of the listed size, under the
ETag that the file had first. Files in Xet storage need no special case: the redirect leads to a server that assembles
them and serves ranges.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from quarkconv.errors import HubError, SourceError
from quarkconv.files.base import Range
from quarkconv.files.remote import Entry
from quarkconv.hub import http
from quarkconv.hub.errors import hub_error
from quarkconv.hub.http import RETRIES, backoff, is_transient, retried

REFUSALS: Final = 2
"""Retries, each under a new URL, after a store refused a URL that the Hub had just signed."""
_EXPIRED: Final = (400, 401, 403, 404, 410)  # how stores respond to a URL whose signature has expired


@dataclass(frozen=True, slots=True)
class _Location:
    """Where the bytes of a file are: on the Hub itself, or at a signed URL that expires."""

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

    def fetch(self, requested: Range) -> bytes:
        """The bytes of a range that lies inside its file; a broken transfer resumes where it broke.

        Raises:
            SourceError: the Hub does not serve the range, or serves something else.
        """
        data = bytearray()
        file, start, end = requested

        def rest() -> None:
            while len(data) < end - start:
                before = len(data)
                self._transfer(Range(file, start + before, end), data)
                if len(data) == before:
                    raise _NoBytes

        try:
            retried(rest, _transfer_pause, lambda: len(data))
        except _NoBytes:
            raise self._empty(requested) from None
        except http.client().HTTPError as error:
            raise hub_error(error, str(self), file) from error
        return bytes(data)

    def locate(self, name: str) -> _Location:
        """Request the URL of a file.

        Raises:
            SourceError: the ETag, size or commit differs from the listing, or the file is gone.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self._repo, name, revision=self._commit, endpoint=constants.ENDPOINT)

        def request() -> Any:
            self._count()
            return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, retry_on_errors=True)

        try:
            found = retried(request, _metadata_pause)
        except (http.client().HTTPError, RecursionError) as error:
            raise hub_error(error, str(self), name) from error
        entry = self._entries[name]
        if (
            found.etag != entry.etag
            or found.size not in (None, entry.size)
            or found.commit_hash not in (None, self._commit)
        ):
            raise self._changed(
                name,
                f"ETag {entry.etag}, {entry.size} bytes, commit {self._commit}",
                f"ETag {found.etag}, {found.size} bytes, commit {found.commit_hash}",
            )
        address = urljoin(url, found.location)
        location = _Location(address, _server(address) == _server(url))
        with self._lock:
            self._locations[name] = location
        return location

    def _transfer(self, requested: Range, data: bytearray) -> None:
        """Append what one response holds of a range."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        name, start, end = requested
        for fresh in (False, True):
            location = self.locate(name) if fresh else self._locations.get(name) or self.locate(name)
            headers = build_hf_headers(token=None if location.at_hub else False)
            headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            self._count()
            try:
                with http_stream_backoff(
                    "GET",
                    location.url,
                    headers=headers,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    max_retries=RETRIES,
                    base_wait_time=http.FIRST_WAIT,
                    retry_on_exceptions=(),
                ) as response:
                    expired = response.status_code in _EXPIRED and not location.at_hub
                    if expired and not fresh:
                        continue
                    if response.status_code != 416:
                        hf_raise_for_status(response)
                    self._check_response(name, start, end, response)
                    self._take(response, end - start, data)
            except HfHubHTTPError as error:
                if not location.at_hub and error.response.status_code in _EXPIRED:
                    raise  # stores occasionally refuse what they serve a moment later
                raise hub_error(error, str(self), name) from error
            return

    def _take(self, response: Any, room: int, data: bytearray) -> None:
        """Append the undecoded body of a response, at most ``room`` bytes of it."""
        before = len(data)
        try:
            for chunk in response.iter_raw():
                data += chunk[:room]
                room -= len(chunk)
                if room < 0:  # a server that sends too much may never stop
                    return
        finally:
            with self._lock:
                self.nbytes += len(data) - before

    def _check_response(self, name: str, start: int, end: int, response: Any) -> None:
        """Raise unless a response holds (the beginning of) the requested range."""
        size = self._entries[name].size
        stated = response.headers.get("Content-Range", "")
        coding = response.headers.get("Content-Encoding", "")
        whole = response.status_code == 200 and (start, end) == (0, size)
        plain = coding.strip().lower() in ("", "identity")
        if not plain or not (whole or (response.status_code == 206 and _is_range(stated, start, end, size))):
            raise HubError(
                "The Hub sent other bytes than requested",
                file=f"{self}/{name}",
                expected=f"bytes {start}-{end - 1}/{size}",
                found=f"status {response.status_code}, Content-Range {stated or 'missing'}"
                + ("" if plain else f", Content-Encoding {coding}"),
                hint="a proxy or mirror may not support ranges: set HF_ENDPOINT to another, or use --cache",
            )
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            with self._lock:  # each store has its own ETags, and the Hub may redirect to another store next time
                first = self._etags.setdefault((name, _server(str(response.url))), etag)
            if etag != first:
                raise self._changed(name, f"ETag {first}", f"ETag {etag}")

    def _count(self) -> None:
        with self._lock:
            self.requests += 1

    def _empty(self, requested: Range) -> HubError:
        return HubError(
            "The Hub's responses end before the range does",
            file=f"{self}/{requested.file}",
            expected=f"bytes {requested.start}-{requested.end - 1}",
            found="empty responses",
            hint="a proxy or mirror may be broken: set HF_ENDPOINT to another, or use --cache",
        )

    def _changed(self, name: str, expected: str, found: str) -> SourceError:
        return SourceError(
            "A file on the Hub differs from the one that was listed",
            code="source-changed",
            file=f"{self}/{name}",
            expected=expected,
            found=found,
            hint="run the command again, with --overwrite if an earlier run was interrupted",
        )


class _NoBytes(Exception):  # noqa: N818 - becomes a HubError
    """A response to a range request was empty."""


def _transfer_pause(error: Exception, failures: int) -> float | None:
    """Seconds before a transfer resumes; None where a retry would fail as well."""
    retries = 0
    if getattr(error, "response", None) is not None and not isinstance(error, HubError):
        retries = REFUSALS
    elif isinstance(error, _NoBytes) or is_transient(error):
        retries = RETRIES
    return backoff(failures) if failures <= retries else None


def _metadata_pause(error: Exception, failures: int) -> float | None:
    """The same of a request for a file's URL: huggingface_hub retries all but errors of a proxy itself."""
    transient = isinstance(error, http.client().ProxyError) and is_transient(error)
    return backoff(failures) if transient and failures <= RETRIES else None


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
