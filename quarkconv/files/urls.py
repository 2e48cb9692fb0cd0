"""URLs of models. Separate from the clients, which a local model does not need."""

from __future__ import annotations

from typing import Final

SCHEMES: Final = ("s3://", "gs://", "az://")
"""The object stores, by the start of their URLs. To add one that obstore supports, add its scheme."""
BUCKETS: Final = "hf://buckets/"
MODELSCOPE: Final = "modelscope://"
_READ_ONLY: Final = ("hf://", MODELSCOPE)


def is_store_url(model: str) -> bool:
    """Whether the name of a model is the URL of an object store."""
    return model.startswith(SCHEMES)


def is_read_only_url(model: str) -> bool:
    """Whether the name of a model is the URL of a service that quarkconv reads from and does not write to."""
    return model.startswith(_READ_ONLY)


def is_url(model: str) -> bool:
    """Whether the name of a model is a URL, whose files are read where they are."""
    return is_store_url(model) or is_read_only_url(model)
