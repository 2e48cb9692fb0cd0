"""Byte ranges of one commit of a repo on the Hub, and of a bucket there.

huggingface_hub handles URLs, tokens, endpoints and redirects. Files in Xet storage need no special case: the redirect
leads to a server that assembles them and serves ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin

from quarkconv.errors import HubError, SourceError
from quarkconv.files import http
from quarkconv.files.http import RETRIES, backoff, is_transient, retried
from quarkconv.files.http_ranges import HttpRanges, Location, server_of
from quarkconv.files.remote import Entry
from quarkconv.hub.errors import hub_error


class _State(NamedTuple):
    """A file as the Hub describes it in response to HEAD; None for what the Hub does not state."""

    etag: str | None
    size: int | None
    commit: str | None

    def __str__(self) -> str:
        commit = "" if self.commit is None else f", commit {self.commit}"
        return f"ETag {self.etag}, {self.size} bytes{commit}"


class HubRanges(HttpRanges):
    """Reads ranges of the files of one commit.

    Args:
        repo: ``org/name``.
        commit: its hash.
        entries: its files.
    """

    service = "the Hub"
    mirror_hint = "set HF_ENDPOINT to another, or use --cache"

    def __init__(self, repo: str, commit: str | None, entries: Mapping[str, Entry]) -> None:
        super().__init__(repo if commit is None else f"{repo}@{commit}", entries)
        self._repo = repo
        self._commit = commit

    def error(self, error: Exception, name: str) -> SourceError:
        """The error for a failed request about a file."""
        return hub_error(error, str(self), name)

    def _located(self, name: str) -> Location:
        from huggingface_hub import constants, get_hf_file_metadata

        url = self._url(name)

        def request() -> Any:
            self.count()
            return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, retry_on_errors=True)

        try:
            found = retried(request, _metadata_pause)
        except (http.client().HTTPError, RecursionError) as error:
            raise self.error(error, name) from error
        entry, state = self._entries[name], self._state(found)
        if state.etag != entry.etag or state.size not in (None, entry.size) or state.commit not in (None, self._commit):
            raise self.changed(name, str(_State(entry.etag, entry.size, self._commit)), str(state))
        address = urljoin(url, found.location)
        return Location(address, server_of(address) == server_of(url))

    def _url(self, name: str) -> str:
        from huggingface_hub import constants, hf_hub_url

        return hf_hub_url(self._repo, name, revision=self._commit, endpoint=constants.ENDPOINT)

    def _state(self, found: Any) -> _State:
        return _State(found.etag, found.size, found.commit_hash)

    def _headers(self, *, at_service: bool) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers: dict[str, str] = build_hf_headers(token=None if at_service else False)
        return headers


class BucketRanges(HubRanges):
    """Reads ranges of the files of a bucket. A bucket has no commits: files are known by their hashes in Xet storage.

    Args:
        bucket: ``org/name``.
        url: of the model, for messages.
        folder: the path of the model in the bucket, with a slash at its end; empty for all of the bucket.
        entries: the files by their names in the folder.
    """

    mirror_hint = "set HF_ENDPOINT to another"

    def __init__(self, bucket: str, url: str, folder: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(url, None, entries)
        self._bucket = bucket
        self._folder = folder

    def _url(self, name: str) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/buckets/{self._bucket}/resolve/{quote(self._folder + name)}"

    def _state(self, found: Any) -> _State:
        if found.xet_file_data is None:
            raise HubError(
                "The Hub's response lacks the hash of a file in a bucket",
                file=str(self),
                expected="X-Xet-Hash",
                found="no such header",
                hint=self.mirror_hint,
            )
        return _State(found.xet_file_data.file_hash, found.size, None)


def _metadata_pause(error: Exception, failures: int) -> float | None:
    """Seconds before a file's URL is requested again: huggingface_hub retries all but errors of a proxy itself."""
    transient = isinstance(error, http.client().ProxyError) and is_transient(error)
    return backoff(failures) if transient and failures <= RETRIES else None
