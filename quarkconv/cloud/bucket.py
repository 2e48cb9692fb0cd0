"""The files of a model in an object store, read by ranges; nothing is stored on disk.

Added to what obstore does: each request demands the ETag that was listed, and each response must have it and the
requested length.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from quarkconv.cloud.stores import failure_of, open_store
from quarkconv.errors import SourceError
from quarkconv.files.base import Range, is_inside
from quarkconv.files.blocks import BLOCK_BYTES
from quarkconv.files.remote import Entry, RemoteFiles
from quarkconv.files.urls import without_slash

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

_log: Final = logging.getLogger(__name__)


class Bucket(RemoteFiles):
    """The files below one URL of an object store, as they were listed. Made by :func:`open_bucket`."""

    ahead_bytes = 2 * BLOCK_BYTES  # parts of uploads are in memory as well
    pins_etags = True

    def __init__(self, url: str, store: ObjectStore, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self._url = url
        self._store = store
        self._lock = threading.Lock()
        self._nbytes = self._requests = 0

    def __str__(self) -> str:
        return self._url

    def fetch(self, requested: Range) -> memoryview:
        """The bytes of a range that lies inside its file.

        Raises:
            SourceError: the store does not send them, or the file has changed.
        """
        import obstore

        name, start, end = requested
        if start == end:
            return memoryview(b"")
        try:
            response = obstore.get(
                self._store, name, options={"range": (start, end), "if_match": self.entries[name].etag}
            )
            data = memoryview(response.bytes())  # without a copy
            found, size, etag = tuple(response.range), response.meta["size"], entry_of(response.meta).etag
        except Exception as error:  # of obstore, and OSErrors
            raise self._error(error, name) from error
        with self._lock:
            self._nbytes += len(data)
            self._requests += 1
        if etag != self.entries[name].etag:  # of a store that ignores If-Match
            raise self._changed(name, f"ETag {etag}" if etag else "no ETag")
        if (*found, len(data), size) != (start, end, end - start, self.entries[name].size):
            raise _unavailable(
                "The object store sent the wrong bytes",
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
        now = entry_of(meta)
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
            "A file in the object store has changed since it was listed",
            code="source-changed",
            file=f"{self}/{name}",
            expected=f"ETag {entry.etag}, {entry.size} bytes",
            found=found,
            hint="run the command again, with --overwrite if an earlier run was interrupted",
        )


def open_bucket(url: str) -> Bucket:
    """List the files of a model in an object store.

    Args:
        url: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``.

    Raises:
        UsageError: obstore is not installed, the URL is invalid, or there are no credentials.
        SourceError: the store cannot be reached, refuses, or has no files there.
    """
    url = without_slash(url)
    store = open_store(url)
    try:
        entries = list_entries(store)
    except Exception as error:  # of obstore, and OSErrors
        raise _store_error(error, url, None) from error
    for name, entry in entries.items():
        if not is_inside(name) or not entry.etag:
            raise _unavailable(
                "The object store's listing is invalid",
                url,
                expected="relative paths, and an ETag for each file",
                found=repr(name)[:300],
            )
    if not entries:
        raise _unavailable(
            "This URL has no files",
            url,
            expected="config.json and *.safetensors",
            hint="check bucket and path",
        )
    _log.info("%s: %d files, %d bytes", url, len(entries), sum(entry.size for entry in entries.values()))
    return Bucket(url, store, entries)


def list_entries(store: ObjectStore) -> dict[str, Entry]:
    """The objects below the URL of a store by their relative names.

    Raises:
        Exception: of obstore.
    """
    import obstore

    return {meta["path"]: entry_of(meta) for chunk in obstore.list(store) for meta in chunk}


def entry_of(meta: ObjectMeta) -> Entry:
    """Size and ETag of an object. Azure lists ETags without the quotes that its headers have."""
    etag = meta["e_tag"] or ""
    return Entry(meta["size"], etag if not etag or etag.endswith('"') else f'"{etag}"')


def _store_error(error: Exception, url: str, name: str | None) -> SourceError:
    """The error for a failed request."""
    message, found, hint = failure_of(error, url, "read")
    return _unavailable(message, url if name is None else f"{url}/{name}", found=found, hint=hint)


def _unavailable(
    message: str, file: str, *, expected: str | None = None, found: str | None = None, hint: str | None = None
) -> SourceError:
    return SourceError(message, code="store-unavailable", file=file, expected=expected, found=found, hint=hint)
