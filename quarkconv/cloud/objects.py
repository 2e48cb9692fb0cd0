"""Objects below one URL that are written: whole, on condition, or as a stream of parts.

An object appears when its last part has arrived, and never in pieces: a store has no half-written files to rename.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from quarkconv.cloud.bucket import entry_of, list_entries
from quarkconv.cloud.stores import failure_of, open_store
from quarkconv.errors import UsageError, WriteError
from quarkconv.files.remote import CONNECTIONS, Entry
from quarkconv.files.urls import without_slash

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode, PutResult, WritableFile
    from obstore.store import ObjectStore

MAX_PARTS: Final = 10_000
MAX_PART_BYTES: Final = 5 * 2**30
"""Limits of S3 for one object: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""
PART_BYTES: Final = 5 * 2**20
"""Least size of a part, except the last: what S3 demands. Small parts are sent soon, and take little memory."""
_IN_FLIGHT_BYTES: Final = 2 * PART_BYTES
"""Bytes of one object that are on their way; one part at least."""
_ATTEMPTS: Final = 6
_PAUSE: Final = 0.1  # seconds before the second attempt; each further pause is twice as long
_RESUMES: Final = "run the same command again: it resumes where it stopped"


def part_size(nbytes: int) -> int:
    """The size of the parts of an object, so that their number stays within the limit; whole MiB.

    Raises:
        UsageError: no object can be that large.
    """
    size = PART_BYTES if nbytes <= PART_BYTES * MAX_PARTS else -(-nbytes // MAX_PARTS // 2**20) * 2**20
    if size > MAX_PART_BYTES:
        raise UsageError(
            "An object store cannot hold a shard of this size",
            expected=f"at most {MAX_PARTS * MAX_PART_BYTES} bytes",
            found=f"{nbytes} bytes",
            hint="give a smaller --max-shard-size",
        )
    return size


class Version(NamedTuple):
    """What identifies a state of an object: Google compares the version (its generation), others compare the ETag."""

    etag: str
    version: str


_NO_VERSION: Final = Version('"0"', "1")
"""A version that no object has."""


class Objects:
    """The objects below a URL, to write, read back and delete. No request is made before the first call.

    Args:
        url: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``.

    Raises:
        UsageError: obstore is not installed, the URL is invalid, or there are no credentials.
    """

    def __init__(self, url: str) -> None:
        self.url: Final = without_slash(url)
        self.store: Final[ObjectStore] = open_store(self.url)

    def entries(self) -> dict[str, Entry]:
        """Every object by its name below the URL.

        Raises:
            WriteError: the store refuses, or cannot be reached; so do all other methods.
        """
        with self._request(None):
            return list_entries(self.store)

    def entry(self, name: str) -> Entry | None:
        """Size and ETag of an object; None without the object."""
        import obstore

        with self._request(name), suppress(FileNotFoundError):
            return entry_of(obstore.head(self.store, name))
        return None

    def version(self, name: str) -> Version | None:
        """The version of an object; None without the object."""
        import obstore

        with self._request(name), suppress(FileNotFoundError):
            return _version_of(obstore.head(self.store, name))
        return None

    def get(self, name: str) -> tuple[bytes, Version] | None:
        """The bytes of a small object and its version; None without the object."""
        import obstore

        with self._request(name), suppress(FileNotFoundError):
            response = obstore.get(self.store, name)
            return bytes(response.bytes()), _version_of(response.meta)
        return None

    def get_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of small objects by their names, without those that are gone."""
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="quarkconv-objects") as pool:
            requested = list(names)
            found = zip(requested, pool.map(self.get, requested), strict=True)
            return {name: item[0] for name, item in found if item is not None}

    def put(self, name: str, data: bytes) -> None:
        """Write a small object."""
        import obstore

        with self._request(name):
            obstore.put(self.store, name, data, use_multipart=False)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object unless there is one of this name.

        Returns:
            Whether it was written.

        Raises:
            ConditionsUnsupportedError: the store refuses conditions.
        """
        return self.create_or_replace(name, data, None) is not None

    def create_or_replace(self, name: str, data: bytes, found: Version | None) -> Version | None:
        """Write a small object if the one of this name still has a version; for None, if there is none.

        Returns:
            The new version; None where the condition did not hold.

        Raises:
            ConditionsUnsupportedError: the store refuses conditions.
        """
        return self._put_if(name, data, "create" if found is None else {"e_tag": found.etag, "version": found.version})

    def require_conditions(self, name: str) -> None:
        """Refuse a store that does not write on condition, or ignores conditions; ``name`` is written and deleted.

        Raises:
            ConditionsUnsupportedError: it does not.
        """
        name = f"{name}-{uuid.uuid4().hex}"
        try:
            created = self.create(name, b"1") and not self.create(name, b"2")
            honoured = created and self.create_or_replace(name, b"3", _NO_VERSION) is None
        finally:
            self.delete([name])
        if not honoured:
            raise ConditionsUnsupportedError(self.url)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are gone already do not matter."""
        import obstore

        if chosen := list(names):
            with self._request(chosen[0]):
                try:
                    obstore.delete(self.store, chosen)
                except FileNotFoundError:  # of one of them, and Google's store has those behind it still
                    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="quarkconv-objects") as pool:
                        list(pool.map(self._delete, chosen))

    def writer(self, name: str, nbytes: int) -> ObjectWriter:
        """Begin an object of a known size.

        Raises:
            UsageError: no object can be that large.
        """
        import obstore

        size = part_size(nbytes)
        with self._request(name):
            stream = obstore.open_writer(
                self.store, name, buffer_size=size, max_concurrency=max(1, _IN_FLIGHT_BYTES // size)
            )
        return ObjectWriter(self, name, stream)

    def _delete(self, name: str) -> None:
        import obstore

        with suppress(FileNotFoundError):
            obstore.delete(self.store, name)

    def _put_if(self, name: str, data: bytes, mode: PutMode) -> Version | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, GenericError, NotSupportedError, PreconditionError

        for attempt in range(_ATTEMPTS):
            try:
                return _version_of(obstore.put(self.store, name, data, mode=mode))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                # After a response that was lost, the object may be the one that was sent.
                found = self.get(name) if attempt else None
                return found[1] if found is not None and found[0] == data else None
            except NotSupportedError as error:
                raise ConditionsUnsupportedError(self.url) from error
            except Exception as error:  # of obstore, and OSErrors
                if "NotImplemented" in str(error):
                    raise ConditionsUnsupportedError(self.url) from error
                # obstore sends no conditional request again whose connection broke.
                if attempt == _ATTEMPTS - 1 or not isinstance(error, GenericError):
                    raise self.error(error, name) from error
                time.sleep(_PAUSE * 2**attempt)
        raise AssertionError

    @contextmanager
    def _request(self, name: str | None) -> Iterator[None]:
        """Turn the failure of a request about an object, or about all of them, into a WriteError."""
        try:
            yield
        except Exception as error:  # of obstore, and OSErrors
            raise self.error(error, name) from error

    def error(self, error: Exception, name: str | None) -> WriteError:
        """The error for a failed request about an object, or about all of them."""
        message, found, hint = failure_of(error, self.url, "written to")
        file = self.url if name is None else f"{self.url}/{name}"
        return WriteError(message, file=file, found=found, hint=f"{hint}; then {_RESUMES}")


def _version_of(found: ObjectMeta | PutResult) -> Version:
    return Version(found["e_tag"] or "", found["version"] or "")


class ObjectWriter:
    """A stream into one object. Made by :meth:`Objects.writer`."""

    def __init__(self, objects: Objects, name: str, stream: WritableFile) -> None:
        self.name: Final = name
        self._objects = objects
        self._stream: WritableFile | None = stream

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes; they are copied, since the stream keeps what it is given until it is sent.

        Raises:
            WriteError: a part was not accepted; what was sent is discarded.
        """
        self._call(lambda stream: stream.write(bytes(data)))

    def finish(self) -> None:
        """Send the rest and create the object.

        Raises:
            WriteError: the store did not accept it; what was sent is discarded.
        """
        self._call(lambda stream: stream.close())
        self._stream = None

    def abort(self) -> None:
        """Discard what was sent; after :meth:`finish`, do nothing."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):  # of obstore: the upload is gone, or the store cannot be reached
                stream.__exit__(InterruptedError, InterruptedError(), None)

    def _call(self, do: Callable[[WritableFile], object]) -> None:
        if self._stream is None:
            raise ValueError(f"{self.name} is finished or given up")
        try:
            do(self._stream)
        except Exception as error:  # of obstore, and OSErrors
            failure = self._objects.error(error, self.name)
            self.abort()
            raise failure from error


class ConditionsUnsupportedError(WriteError):
    """The store does not write on condition (``If-None-Match``, ``If-Match``)."""

    def __init__(self, url: str) -> None:
        super().__init__(
            "The object store has no conditional writes",
            file=url,
            expected="If-None-Match and If-Match of PUT",
            found="not supported",
            hint="use --part K/N instead: it needs none",
        )
