"""Byte ranges of the files of one revision on ModelScope.

    GET /api/v1/models/ORG/NAME/repo?Revision=REVISION&FilePath=PATH

redirects to a signed URL of a store for files in LFS, which serves ranges and may state their SHA-256 in X-Linked-ETag.
Other files it sends itself, and whole: it ignores Range for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Final, Literal
from urllib.parse import quote_plus, urljoin

from quarkconv.errors import SourceError
from quarkconv.files import http
from quarkconv.files.http_ranges import HttpRanges, Location
from quarkconv.files.remote import Entry
from quarkconv.modelscope.errors import ENDPOINT_HINT, failure

DEFAULT_ENDPOINT: Final = "https://modelscope.cn"
_TIMEOUT: Final = 60.0  # seconds for each step of a request
SHA256: Final = re.compile(r"[0-9a-f]{64}")
_REDIRECTS: Final = (301, 302, 303, 307, 308)


def endpoint() -> str:
    """The URL of ModelScope, as its client reads it from the environment."""
    value = os.environ.get("MODELSCOPE_ENDPOINT", "").strip() or DEFAULT_ENDPOINT
    return (value if "://" in value else f"https://{value}").rstrip("/")


def auth_headers() -> dict[str, str]:
    """The token of the environment in both forms that ModelScope's client sends."""
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}


def request(method: Literal["GET", "HEAD"], url: str, **options: Any) -> Any:
    """The response to a request, retried while the service is busy or unreachable.

    Raises:
        Exception: of the HTTP client of huggingface_hub.
    """
    from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]

    return http_backoff(
        method,
        url,
        headers=auth_headers(),
        timeout=_TIMEOUT,
        base_wait_time=http.FIRST_WAIT,
        **options,
    )


class ModelScopeRanges(HttpRanges):
    """Reads ranges of the files of one revision.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit.
        url: of the model, for messages.
        entries: its files, by SHA-256.
    """

    service = "ModelScope"
    mirror_hint = ENDPOINT_HINT
    largest_whole = 64 * 2**20

    def __init__(self, repo: str, revision: str, url: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(url, entries)
        self._repo = repo
        self._revision = revision

    def error(self, error: Exception, name: str) -> SourceError:
        """The error for a failed request about a file."""
        return failure(error, f"{self}/{name}")

    def _located(self, name: str) -> Location:
        query = f"Revision={quote_plus(self._revision)}&FilePath={quote_plus(name)}"
        url = f"{endpoint()}/api/v1/models/{self._repo}/repo?{query}"
        self.count()
        try:
            response = request("HEAD", url, follow_redirects=False)
            if response.status_code in _REDIRECTS:
                return Location(urljoin(url, response.headers["Location"]), at_service=False)
            response.raise_for_status()
        except (http.client().HTTPError, KeyError) as error:
            raise self.error(error, name) from error
        return Location(url, at_service=True)

    def _headers(self, *, at_service: bool) -> dict[str, str]:
        return auth_headers() if at_service else {}

    def _stated_hash(self, headers: Mapping[str, str]) -> str | None:
        stated: str = headers.get("X-Linked-ETag", "").strip('"').lower()
        return stated if SHA256.fullmatch(stated) else None

    def refuse(self, name: str, entry: Entry, now: Entry | None) -> SourceError:
        """The error for a file that the service lists with another hash or size than before."""
        found = "no such file" if now is None else f"hash {now.etag}, {now.size} bytes"
        return self.changed(name, f"hash {entry.etag}, {entry.size} bytes", found)
