"""A model in a bucket."""

from __future__ import annotations

import hashlib
from pathlib import Path

URL = "s3://models/org/tiny-moe"
OUT = "s3://models/out/tiny-moe"


def publish(folder: Path, url: str = URL) -> None:
    """Put the files of a directory into the bucket that the environment leads to."""
    import obstore
    from obstore.store import from_url

    store = from_url(url)
    for path in folder.rglob("*"):
        if path.is_file():
            obstore.put(store, path.relative_to(folder).as_posix(), path.read_bytes(), use_multipart=False)


def objects(url: str = OUT) -> dict[str, str]:
    """Every object below a URL with a hash of its bytes."""
    import obstore
    from obstore.store import from_url

    store = from_url(url)
    return {name: hashlib.sha256(bytes(obstore.get(store, name).bytes())).hexdigest() for name in names(url)}


def names(url: str = OUT) -> list[str]:
    """The names of the objects below a URL; another process may delete them meanwhile."""
    import obstore
    from obstore.store import from_url

    return sorted(meta["path"] for chunk in obstore.list(from_url(url)) for meta in chunk)


def put(url: str, data: bytes) -> None:
    """Write one object."""
    import obstore
    from obstore.store import from_url

    folder, _, name = url.rpartition("/")
    obstore.put(from_url(folder), name, data)
