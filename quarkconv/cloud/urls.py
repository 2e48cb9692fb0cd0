"""URLs of object stores. Separate from their client, which a local model does not need."""

from __future__ import annotations

from typing import Final

SCHEMES: Final = ("s3://", "gs://", "az://")
"""The object stores, by the start of their URLs. To add one that obstore supports, add its scheme."""


def is_store_url(model: str) -> bool:
    """Whether the name of a model is the URL of an object store."""
    return model.startswith(SCHEMES)
