"""Leases as objects below the URL of an output."""

from __future__ import annotations

from quarkconv.cloud.objects import Objects, Version
from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.write.leases import LEASES_NAME, Token


class ObjectLeases:
    """Leases as objects."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def read(self, name: str) -> Token | None:
        """The version of the lease."""
        return self._objects.version(lease_name(name))

    def write(self, name: str, data: bytes, found: Token | None) -> Token | None:
        """Create the object, or replace it under its version."""
        return self._objects.create_or_replace(lease_name(name), data, None if found is None else Version(*found))

    def delete(self, name: str, found: Token) -> None:  # noqa: ARG002
        """Delete the object."""
        self._objects.delete([lease_name(name)])


def lease_name(name: str) -> str:
    """The name of the object of a lease."""
    return f"{STAGING_NAME}/{LEASES_NAME}/{name}"
