"""A model in a bucket."""

from __future__ import annotations

from pathlib import Path

URL = "s3://models/org/tiny-moe"


def publish(folder: Path, url: str = URL) -> None:
    """Put the files of a directory into the bucket that the environment leads to."""
    import obstore
    from obstore.store import from_url

    store = from_url(url)
    for path in folder.rglob("*"):
        if path.is_file():
            obstore.put(store, path.relative_to(folder).as_posix(), path.read_bytes(), use_multipart=False)
