"""URLs of models. Separate from the clients, which a local model does not need."""

from __future__ import annotations

import re
from typing import Final

SCHEMES: Final = ("s3://", "gs://", "az://")
"""The object stores, by the start of their URLs. To add one that obstore supports, add its scheme."""
BUCKETS: Final = "hf://buckets/"
MODELSCOPE: Final = "modelscope://"
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_store_url(model: str) -> bool:
    """Whether the name of a model is the URL of an object store."""
    return model.startswith(SCHEMES)


def scheme_of(url: str) -> str:
    """The scheme of the URL of an object store, such as ``s3://``."""
    return next(scheme for scheme in SCHEMES if url.startswith(scheme))


def bucket_of(url: str) -> str:
    """The bucket of a URL."""
    return url.partition("://")[2].partition("/")[0]


def prefix_of(url: str) -> str:
    """The path of a URL inside its bucket; empty for a whole bucket."""
    return url.partition("://")[2].partition("/")[2]


def without_slash(url: str) -> str:
    """The URL without slashes at its end, except those of its scheme.

    >>> without_slash("s3://bucket/path/"), without_slash("s3://")
    ('s3://bucket/path', 's3://')
    """
    scheme, separator, path = url.partition("://")
    return f"{scheme}{separator}{path.rstrip('/')}"


def is_url(model: str) -> bool:
    """Whether the name of a model is a URL, of whatever service."""
    return _URL.match(model) is not None
