"""ETags as stores state them: in quotes in headers and in most listings, without quotes in Azure's listing."""

from __future__ import annotations

from typing import Any

import pytest

from quarkconv.cloud.bucket import entry_of
from quarkconv.files.remote import Entry


@pytest.mark.parametrize(
    ("stated", "etag"),
    [
        ('"0x8DA"', '"0x8DA"'),
        ("0x8DA", '"0x8DA"'),
        ('W/"0x8DA"', 'W/"0x8DA"'),
        ('"d41d-2"', '"d41d-2"'),
        (None, ""),
        ("", ""),
    ],
)
def test_one_object_has_one_etag(stated: str | None, etag: str) -> None:
    meta: Any = {"size": 7, "e_tag": stated}
    assert entry_of(meta) == Entry(7, etag)
