"""Leases: which of several workers does a piece of work, without a server, locks or clocks that agree.

A worker takes a lease by writing it where there is none, and renews it by writing it again. Another worker takes over
a lease that was not renewed for :data:`LEASE_SECONDS` of that worker's own monotonic clock. Every write is conditional
on what was read before, so that of several workers one succeeds: an object is replaced under its ETag; in a directory a
lease has generations, ``NAME.7`` after ``NAME.6``, and a file is created by link(2), which fails where it exists.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

LEASE_SECONDS: Final = 60.0
"""Seconds without renewal after which a lease can be taken over."""
_RENEWALS: Final = 4
"""Renewals within that time."""
LEASES_NAME: Final = "leases"

Token = tuple[str, ...]
"""What identifies a state of a lease."""


class LeaseStore(Protocol):
    """Where leases are kept."""

    def read(self, name: str) -> Token | None:
        """The state of a lease; None without one."""

    def write(self, name: str, data: bytes, found: Token | None) -> Token | None:
        """Write a lease whose state is still ``found``; None where another worker was faster."""

    def delete(self, name: str, found: Token) -> None:
        """Delete a lease that this worker holds."""


class DirectoryLeases:
    """Leases in the working folder of an output directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / LEASES_NAME
        self._folder.mkdir(exist_ok=True)

    def read(self, name: str) -> Token | None:
        """The number of the last generation."""
        generations = self._generations(name)
        return (str(max(generations)),) if generations else None

    def write(self, name: str, data: bytes, found: Token | None) -> Token | None:
        """Create the next generation."""
        generation = 0 if found is None else int(found[0]) + 1
        path = self._path(name, generation)
        new = self._folder / f".{uuid.uuid4().hex}"
        new.write_bytes(data)
        try:
            os.link(new, path)
        except FileExistsError:
            # Over NFS, a reply may be lost, and the request be made again: open(2) says to look at the number of links.
            if new.stat().st_nlink < 2:
                return None
        finally:
            new.unlink()
        others = self._generations(name)
        if max(others, default=generation) > generation:  # the worker of a later one deleted it
            path.unlink(missing_ok=True)
            return None
        for other in others:
            if other < generation:
                self._path(name, other).unlink(missing_ok=True)
        return (str(generation),)

    def delete(self, name: str, found: Token) -> None:
        """Delete the generation that this worker created."""
        self._path(name, int(found[0])).unlink(missing_ok=True)

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f"{name}.{generation}"

    def _generations(self, name: str) -> list[int]:
        endings = (path.name.removeprefix(f"{name}.") for path in self._folder.glob(f"{name}.*"))
        return [int(ending) for ending in endings if ending.isdecimal()]


class Leases:
    """The leases of one worker.

    Args:
        store: where they are kept.
        clock: seconds that only go forward, of this worker alone.
    """

    def __init__(self, store: LeaseStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._worker = uuid.uuid4().hex
        self._writes = 0
        self._held: dict[str, Token] = {}
        self._seen: dict[str, tuple[Token, float]] = {}
        self._taken_over: set[str] = set()
        self._lock = threading.Lock()

    def take(self, name: str) -> bool:
        """Take a lease, or take over one that has not been renewed; False where another worker holds it."""
        with self._lock:
            if name not in self._seen and self._write(name, None):
                return True
            found = self._store.read(name)
            if found is not None:
                before, since = self._seen.setdefault(name, (found, self._clock()))
                if before != found:
                    self._seen[name] = (found, self._clock())
                    return False
                if self._clock() - since < LEASE_SECONDS:
                    return False
                self._taken_over.add(name)
            return self._write(name, found)

    def took_over(self, name: str) -> bool:
        """Whether another worker that took the lease did not give it back."""
        return name in self._taken_over

    def holds(self, name: str) -> bool:
        """Whether the lease was held at its last renewal."""
        return name in self._held

    def renew(self) -> None:
        """Renew every lease that is held; one that was taken over is held no more."""
        with self._lock:
            for name, token in list(self._held.items()):
                self._write(name, token)

    def release(self, name: str) -> None:
        """Give a lease back, if it is held."""
        with self._lock:
            token = self._held.pop(name, None)
        if token is not None and self._store.read(name) == token:
            self._store.delete(name, token)

    @contextmanager
    def renewing(self) -> Iterator[None]:
        """Renew what is held in a thread, and give it back in the end."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(LEASE_SECONDS / _RENEWALS):
                with suppress(Exception):  # the store cannot be reached: the next renewal may succeed
                    self.renew()

        thread = threading.Thread(target=run, name="quarkconv-leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            for name in list(self._held):
                with suppress(Exception):  # it expires
                    self.release(name)

    def _write(self, name: str, found: Token | None) -> bool:
        self._writes += 1
        data = json.dumps({"worker": self._worker, "write": self._writes}).encode()
        token = self._store.write(name, data, found)
        if token is None:
            self._held.pop(name, None)
            return False
        self._held[name] = token
        return True
