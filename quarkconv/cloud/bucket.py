"""The files of a model in an object store, read by ranges; nothing is stored on disk.

obstore (the object_store crate of Apache Arrow) handles credentials, endpoints, regions, signatures, and retries with
backoff. Added here: each request demands the ETag that was listed, and each response must have the requested length.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from quarkconv.cloud.urls import SCHEMES
from quarkconv.errors import SourceError, UsageError
from quarkconv.files.base import Range
from quarkconv.files.remote import Entry, RemoteFiles, is_inside

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_RETRIES: Final = 8
_PATIENCE: Final = timedelta(minutes=3)
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_CREDENTIALS: Final = {
    "s3://": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs://": "GOOGLE_APPLICATION_CREDENTIALS",
    "az://": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_STATUS: Final = re.compile(r"status code: (\d{3}[^:<\n]*)|<Code>([A-Za-z]+)</Code>")

_log: Final = logging.getLogger(__name__)


class Bucket(RemoteFiles):
    """The files below one URL of an object store, as they were listed. Made by :func:`open_bucket`."""

    def __init__(self, url: str, store: ObjectStore, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self._url = url
        self._store = store
        self._lock = threading.Lock()
        self._nbytes = self._requests = 0

    def __str__(self) -> str:
        return self._url

    def fetch(self, requested: Range) -> bytes:
        """The bytes of a range that lies inside its file.

        Raises:
            SourceError: the store does not send them, or the file has changed.
        """
        import obstore

        name, start, end = requested
        if start == end:
            return b""
        try:
            response = obstore.get(
                self._store, name, options={"range": (start, end), "if_match": self.entries[name].etag}
            )
            data = bytes(response.bytes())
            found, size = tuple(response.range), response.meta["size"]
        except Exception as error:  # of obstore, and OSErrors
            raise self._error(error, name) from error
        with self._lock:
            self._nbytes += len(data)
            self._requests += 1
        if (*found, len(data), size) != (start, end, end - start, self.entries[name].size):
            raise _unavailable(
                "The object store sent other bytes than requested",
                f"{self}/{name}",
                expected=f"bytes {start}-{end - 1}/{self.entries[name].size}",
                found=f"bytes {found[0]}-{found[1] - 1}/{size}, {len(data)} bytes long",
                hint="a proxy may be broken: check the endpoint",
            )
        return data

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Check the ETags of some files again.

        Raises:
            SourceError: the ETag or size of one has changed, or it is gone.
        """
        for _ in self.pool.map(self._check, names):
            pass

    def traffic(self) -> tuple[int, int]:
        """Bytes read, and requests made."""
        return self._nbytes, self._requests

    def _check(self, name: str) -> None:
        import obstore

        try:
            meta = obstore.head(self._store, name)
        except Exception as error:  # of obstore, and OSErrors
            raise self._error(error, name) from error
        now = Entry(meta["size"], meta["e_tag"] or "")
        if now != self.entries[name]:
            raise self._changed(name, f"ETag {now.etag}, {now.size} bytes")

    def _error(self, error: Exception, name: str) -> SourceError:
        from obstore.exceptions import PreconditionError

        if isinstance(error, PreconditionError | FileNotFoundError):
            return self._changed(name, "another ETag" if isinstance(error, PreconditionError) else "no such file")
        return _store_error(error, self._url, name)

    def _changed(self, name: str, found: str) -> SourceError:
        entry = self.entries[name]
        return SourceError(
            "A file in the object store differs from the one that was listed",
            code="source-changed",
            file=f"{self}/{name}",
            expected=f"ETag {entry.etag}, {entry.size} bytes",
            found=found,
            hint="run the command again, with --overwrite if an earlier run was interrupted",
        )


def open_bucket(url: str) -> Bucket:
    """List the files of a model in an object store.

    Args:
        url: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``. Credentials, region and endpoint
            come from the environment, in the variables of the store's own tools.

    Raises:
        UsageError: obstore is not installed, or the URL is invalid.
        SourceError: the store cannot be reached, refuses, or has no files there.
    """
    try:
        import obstore
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(
            "Object stores need obstore",
            expected="obstore",
            found="not installed",
            hint="pip install obstore",
        ) from error
    given, url = url, url.rstrip("/")
    try:
        store = from_url(
            url,
            retry_config={"max_retries": _RETRIES, "retry_timeout": _PATIENCE},
            client_options={"allow_http": True} if _plain_http() else None,
        )
    except Exception as error:  # obstore has no common class for these
        raise UsageError(
            "Invalid URL of an object store", expected="s3://bucket/path, gs:// or az://", found=repr(given)[:300]
        ) from error
    entries = {}
    try:
        for chunk in obstore.list(store):
            entries.update({meta["path"]: Entry(meta["size"], meta["e_tag"] or "") for meta in chunk})
    except Exception as error:  # of obstore, and OSErrors
        raise _store_error(error, url, None) from error
    prefix = url.partition("://")[2].partition("/")[2]
    entries = {_relative(name, prefix): entry for name, entry in entries.items()}
    for name, entry in entries.items():
        if not is_inside(name) or not entry.etag:
            raise _unavailable(
                "The listing of the object store cannot be used",
                url,
                expected="relative paths, and an ETag for each file",
                found=repr(name)[:300],
            )
    if not entries:
        raise _unavailable(
            "There are no files at this URL",
            url,
            expected="config.json and *.safetensors",
            hint="check bucket and path",
        )
    _log.info("%s: %d files, %d bytes", url, len(entries), sum(entry.size for entry in entries.values()))
    return Bucket(url, store, entries)


def _plain_http() -> bool:
    """Whether the user chose an endpoint without TLS, as local servers have it; obstore requires a second consent."""
    return any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


def _relative(name: str, prefix: str) -> str:
    """A listed name without the path of the URL, which some versions of obstore leave in."""
    return name.removeprefix(f"{prefix}/") if prefix else name


def _store_error(error: Exception, url: str, name: str | None) -> SourceError:
    """The error for a failed request."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    scheme = next(scheme for scheme in SCHEMES if url.startswith(scheme))
    found = _first_line(error)
    message, hint = "The object store cannot be read", f"check {_CREDENTIALS[scheme]} and the network"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403" in found or "401" in found:
        message, hint = "The object store refuses access", f"check the credentials: {_CREDENTIALS[scheme]}"
    elif "NoSuchBucket" in found:
        message, hint = "There is no such bucket", "check its name, and the endpoint"
    return _unavailable(message, url if name is None else f"{url}/{name}", found=found, hint=hint)


def _unavailable(
    message: str, file: str, *, expected: str | None = None, found: str | None = None, hint: str | None = None
) -> SourceError:
    return SourceError(message, code="store-unavailable", file=file, expected=expected, found=found, hint=hint)


def _first_line(error: Exception) -> str:
    """The cause of an error of obstore in one line: status and code of a response, or the first line of its message."""
    text = str(error)
    parts = [part for match in _STATUS.finditer(text) for part in match.groups() if part]
    return ": ".join(dict.fromkeys(parts)) if parts else (text.strip().splitlines() or [type(error).__name__])[0][:300]
