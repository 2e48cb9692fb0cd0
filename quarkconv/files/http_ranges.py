"""Byte ranges of files behind HTTP, over connections that break and URLs that expire.

The client of huggingface_hub handles proxies, redirects and rate limits. Added here: every response is checked. A range
is accepted only if the response states the requested range, of a file of the listed size, under the ETag that the file
had first. A service says where its files are, and how to name its failures.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final, NamedTuple
from urllib.parse import urlsplit

from quarkconv.errors import HubError, SourceError
from quarkconv.files import http
from quarkconv.files.base import Range
from quarkconv.files.http import RETRIES, backoff, is_transient, retried
from quarkconv.files.remote import Entry

REFUSALS: Final = 2
"""Retries, each under a new URL, after a store refused a URL that the service had just signed."""
_EXPIRED: Final = (400, 401, 403, 404, 410)  # how stores respond to a URL whose signature has expired


class Location(NamedTuple):
    """Where the bytes of a file are: at the service itself, or at a signed URL that expires."""

    url: str
    at_service: bool


class HttpRanges(ABC):
    """Reads ranges of the files of one model. Used by several threads.

    Args:
        model: its name, for messages.
        entries: its files.
    """

    service: ClassVar[str]
    """The name of the service inside of a sentence."""
    mirror_hint: ClassVar[str]
    """What to do where a proxy or mirror corrupts responses."""
    largest_whole: ClassVar[int] = 0
    """Largest file in bytes that the service itself may send whole instead of a range."""

    def __init__(self, model: str, entries: Mapping[str, Entry]) -> None:
        self._model = model
        self._entries = entries
        self._locations: dict[str, Location] = {}
        self._etags: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self.requests = 0
        self.nbytes = 0

    def __str__(self) -> str:
        return self._model

    def fetch(self, requested: Range) -> bytes:
        """The bytes of a range that lies inside its file; a broken transfer resumes where it broke.

        Raises:
            SourceError: the service does not send the range, or sends something else.
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
            raise self.error(error, file) from error
        return bytes(data)

    def locate(self, name: str) -> Location:
        """Request the URL of a file.

        Raises:
            SourceError: the file differs from the listing, or is gone.
        """
        location = self._located(name)
        with self._lock:
            self._locations[name] = location
        return location

    def count(self) -> None:
        """Count a request."""
        with self._lock:
            self.requests += 1

    @abstractmethod
    def error(self, error: Exception, name: str) -> SourceError:
        """The error for a failed request about a file."""

    @abstractmethod
    def _located(self, name: str) -> Location:
        """As :meth:`locate`."""

    @abstractmethod
    def _headers(self, *, at_service: bool) -> dict[str, str]:
        """The headers of a request for bytes; tokens are sent to the service alone."""

    def _service(self) -> str:
        """The name of the service at the beginning of a sentence."""
        return self.service[0].upper() + self.service[1:]

    def _stated_hash(self, headers: Mapping[str, str]) -> str | None:  # noqa: ARG002
        """The hash of a file in the form of the listing, where a response with its bytes states it."""
        return None

    def _transfer(self, requested: Range, data: bytearray) -> None:
        """Append what one response holds of a range."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

        name, start, end = requested
        for fresh in (False, True):
            location = self.locate(name) if fresh else self._locations.get(name) or self.locate(name)
            headers = self._headers(at_service=location.at_service)
            headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            self.count()
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
                    expired = response.status_code in _EXPIRED and not location.at_service
                    if expired and not fresh:
                        continue
                    if response.status_code != 416:
                        hf_raise_for_status(response)
                    skipped = self._check_response(name, start, end, response, location)
                    self._take(response, skipped, end - start, data)
            except HfHubHTTPError as error:
                if not location.at_service and error.response.status_code in _EXPIRED:
                    raise  # stores occasionally refuse what they serve a moment later
                raise self.error(error, name) from error
            return

    def _take(self, response: Any, skipped: int, room: int, data: bytearray) -> None:
        """Append the undecoded body of a response without its first bytes, at most ``room`` bytes of it."""
        before = len(data)
        try:
            for chunk in response.iter_raw():
                kept = chunk[skipped:]
                skipped -= len(chunk) - len(kept)
                data += kept[:room]
                room -= len(kept)
                if room < 0:  # a server that sends too much may never stop
                    return
        finally:
            with self._lock:
                self.nbytes += len(data) - before

    def _check_response(self, name: str, start: int, end: int, response: Any, location: Location) -> int:
        """Raise unless a response holds (the beginning of) the requested range.

        Returns:
            The bytes of the body before the range: those of a file that was sent whole.
        """
        size = self._entries[name].size
        stated = response.headers.get("Content-Range", "")
        coding = response.headers.get("Content-Encoding", "")
        plain = coding.strip().lower() in ("", "identity")
        whole = response.status_code == 200 and (start, end) == (0, size)
        sent_whole = (
            response.status_code == 200
            and location.at_service
            and size <= self.largest_whole
            and response.headers.get("Content-Length", str(size)) == str(size)
        )
        partial = response.status_code == 206 and _is_range(stated, start, end, size)
        if not plain or not (whole or sent_whole or partial):
            raise HubError(
                f"{self._service()} sent the wrong bytes",
                file=f"{self}/{name}",
                expected=f"bytes {start}-{end - 1}/{size}",
                found=f"status {response.status_code}, Content-Range {stated or 'missing'}"
                + ("" if plain else f", Content-Encoding {coding}"),
                hint=f"a proxy or mirror may not support ranges: {self.mirror_hint}",
            )
        stated_hash = self._stated_hash(response.headers)
        if stated_hash not in (None, self._entries[name].etag):
            raise self.changed(name, f"hash {self._entries[name].etag}", f"hash {stated_hash}")
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            with self._lock:  # each store has its own ETags, and the service may redirect to another store next time
                first = self._etags.setdefault((name, server_of(str(response.url))), etag)
            if etag != first:
                raise self.changed(name, f"ETag {first}", f"ETag {etag}")
        return 0 if partial else start

    def _empty(self, requested: Range) -> HubError:
        return HubError(
            f"{self._service()}'s responses end before the requested range",
            file=f"{self}/{requested.file}",
            expected=f"bytes {requested.start}-{requested.end - 1}",
            found="empty responses",
            hint=f"a proxy or mirror may be broken: {self.mirror_hint}",
        )

    def changed(self, name: str, expected: str, found: str) -> SourceError:
        """The error for a file that differs from the listing."""
        return SourceError(
            f"A file on {self.service} has changed since it was listed",
            code="source-changed",
            file=f"{self}/{name}",
            expected=expected,
            found=found,
            hint="run the command again, with --overwrite if an earlier run was interrupted",
        )


class _NoBytes(Exception):  # noqa: N818 - becomes a HubError
    """A response to a range request was empty."""


def server_of(url: str) -> str:
    """Scheme, name and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _transfer_pause(error: Exception, failures: int) -> float | None:
    """Seconds before a transfer resumes; None where a retry would fail as well."""
    retries = 0
    if getattr(error, "response", None) is not None and not isinstance(error, HubError):
        retries = REFUSALS
    elif isinstance(error, _NoBytes) or is_transient(error):
        retries = RETRIES
    return backoff(failures) if failures <= retries else None


def _is_range(stated: str, start: int, end: int, size: int) -> bool:
    """Whether a Content-Range starts at ``start``, ends at ``end`` or before, and is of a file of ``size`` bytes."""
    unit, _, rest = stated.strip().partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdecimal() and last.isdecimal() and total.isdecimal()):
        return False
    return int(first) == start <= int(last) < end and int(total) == size
