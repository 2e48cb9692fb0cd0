"""A model in a bucket of the Hub: ``hf://buckets/ORG/NAME/PATH``. It is only read; nothing is stored on disk.

Listing and URLs are those of huggingface_hub (``HfApi.list_bucket_tree``, ``HfFileSystem.url``). Built from its source;
not run against the service.
"""

from __future__ import annotations

import logging
import re
from typing import Final

from quarkconv.errors import HubError, UsageError
from quarkconv.files.base import is_inside
from quarkconv.files.http_files import HttpFiles
from quarkconv.files.remote import Entry
from quarkconv.files.urls import BUCKETS, without_slash
from quarkconv.hub.errors import TOKEN_HINT, first_line, hub_error
from quarkconv.hub.ranges import BucketRanges

_URL: Final = re.compile(r"(?P<bucket>[\w.-]+/[\w.-]+)(?:/(?P<folder>.+))?", re.ASCII)

_log: Final = logging.getLogger(__name__)


def open_hub_bucket(url: str) -> HttpFiles:
    """List the files of a model in a bucket of the Hub.

    Args:
        url: ``hf://buckets/ORG/NAME`` or ``hf://buckets/ORG/NAME/PATH``.

    Raises:
        UsageError: the URL is invalid, or huggingface_hub is too old to know buckets.
        HubError: the Hub cannot be reached, refuses, or has no files there.
    """
    from huggingface_hub import HfApi, constants

    url = without_slash(url)
    match = _URL.fullmatch(url.removeprefix(BUCKETS))
    if match is None or not is_inside(url.removeprefix(BUCKETS)):
        raise UsageError("Invalid URL of a bucket", expected=f"{BUCKETS}ORG/NAME/PATH", found=repr(url)[:300])
    bucket, folder = match["bucket"], f"{match['folder']}/" if match["folder"] else ""
    api = HfApi(endpoint=constants.ENDPOINT)
    if not hasattr(api, "list_bucket_tree"):
        raise UsageError(
            "This release of huggingface_hub has no buckets",
            expected="HfApi.list_bucket_tree",
            hint="pip install --upgrade huggingface_hub",
        )
    entries = {}
    try:
        for item in api.list_bucket_tree(bucket, match["folder"], recursive=True):
            if item.type == "file" and item.path.startswith(folder):  # a neighbour's name may begin alike
                entries[item.path.removeprefix(folder)] = Entry(item.size, item.xet_hash)
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError, KeyError
        raise _listing_error(error, url) from error
    for name, entry in entries.items():
        if not is_inside(name) or not entry.etag:
            raise HubError(
                "The Hub's list of files is invalid",
                file=url,
                expected="relative paths, and a hash for each file",
                found=repr(name)[:300],
                hint=BucketRanges.mirror_hint,
            )
    if not entries:
        raise HubError(
            "This URL has no files",
            file=url,
            expected="config.json and *.safetensors",
            hint="check bucket and path with `hf buckets list`",
        )
    _log.info("%s: %d files, %d bytes", url, len(entries), sum(entry.size for entry in entries.values()))
    return HttpFiles(BucketRanges(bucket, url, folder, entries), entries)


def _listing_error(error: Exception, url: str) -> HubError:
    from huggingface_hub.errors import BucketNotFoundError

    if isinstance(error, BucketNotFoundError):
        return HubError(
            "The bucket does not exist",
            file=url,
            expected="a bucket that you can read",
            found=first_line(error),
            hint=f"check its name; {TOKEN_HINT}",
        )
    return hub_error(error, url)
