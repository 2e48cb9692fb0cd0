"""Multipart uploads that a process left behind when it was killed. Their parts take space, and no listing shows them.

object_store aborts an upload that fails, and cannot list other uploads; boto3 can. Google and Azure are not queried:
Azure discards uncommitted blocks after a week by itself, and Google by a lifecycle rule.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Final

from quarkconv.errors import UnsupportedError, UsageError, WriteError
from quarkconv.files.urls import bucket_of, is_store_url, prefix_of, without_slash

_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Upload:
    """An unfinished multipart upload.

    Attributes:
        name: the object, below the URL.
        upload_id: the store's name of the upload.
        started: when it was begun, in ISO 8601.
        nbytes: bytes of the parts that were sent.
    """

    name: str
    upload_id: str
    started: str
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """The upload as a JSON object."""
        return asdict(self)


def list_uploads(url: str) -> list[Upload]:
    """The unfinished multipart uploads below a URL, by name and time.

    Raises:
        UsageError: the URL is not that of a bucket, or boto3 is not installed.
        UnsupportedError: the store is not S3.
        WriteError: the store refuses, or cannot be reached.
    """
    bucket, start = bucket_of(url), _start(url)
    with closing(_client(url)) as client:
        try:
            found = [
                Upload(item["Key"].removeprefix(start), item["UploadId"], item["Initiated"].isoformat(), nbytes)
                for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=start)
                for item in page.get("Uploads", ())
                if (nbytes := _parts_nbytes(client, bucket, item)) is not None
            ]
        except Exception as error:  # botocore has a class for each error
            raise _refused(url, error) from error
    return sorted(found, key=lambda upload: (upload.name, upload.started, upload.upload_id))


def abort_uploads(url: str, uploads: Collection[Upload]) -> None:
    """Discard unfinished uploads; those that are gone already do not matter.

    Raises:
        WriteError: the store refuses, or cannot be reached.
    """
    bucket, start = bucket_of(url), _start(url)
    with closing(_client(url)) as client:
        for upload in uploads:
            try:
                client.abort_multipart_upload(Bucket=bucket, Key=start + upload.name, UploadId=upload.upload_id)
            except client.exceptions.NoSuchUpload:
                pass
            except Exception as error:  # botocore has a class for each error
                raise _refused(url, error) from error


def clear_uploads(url: str, names: Collection[str]) -> int:
    """Discard the unfinished uploads of some objects, where that is possible, and return their number."""
    if not url.startswith("s3://") or not names:
        return 0
    try:
        uploads = [upload for upload in list_uploads(url) if upload.name in names]
        abort_uploads(url, uploads)
    except (UsageError, WriteError) as error:  # not installed, or not permitted: nothing depends on it
        _log.info("unfinished uploads are not cleared: %s", error.message)
        return 0
    return len(uploads)


def _start(url: str) -> str:
    """What the keys of the objects below a URL begin with."""
    prefix = prefix_of(without_slash(url))
    return f"{prefix}/" if prefix else ""


def _client(url: str) -> Any:
    """The client of boto3, with the endpoint and region that obstore reads."""
    if not is_store_url(url) or not bucket_of(url):
        raise UsageError("Invalid URL", expected="s3://bucket or s3://bucket/path", found=repr(url)[:300])
    if not url.startswith("s3://"):
        raise UnsupportedError(
            "Unfinished uploads are listed for S3 only",
            file=url,
            expected="s3://bucket/path",
            hint="set a lifecycle rule for them in the store",
        )
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise UsageError(
            "Listing unfinished uploads needs boto3", expected="boto3", found="not installed", hint="pip install boto3"
        ) from error
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return boto3.client(
            "s3", endpoint_url=endpoint, region_name=region, config=Config(retries={"mode": "standard"})
        )
    except Exception as error:  # botocore has a class for each error
        raise _refused(url, error) from error


def _parts_nbytes(client: Any, bucket: str, upload: dict[str, Any]) -> int | None:
    """Bytes of the parts that were sent; None where the upload has ended meanwhile."""
    pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    try:
        return sum(int(part["Size"]) for page in pages for part in page.get("Parts", ()))
    except client.exceptions.NoSuchUpload:
        return None


def _refused(url: str, error: Exception) -> WriteError:
    if "NoSuchBucket" in str(error):
        return WriteError(
            "The bucket does not exist", file=url, found=str(error)[:300], hint="check its name, and the endpoint"
        )
    return WriteError(
        "The object store does not list or discard unfinished uploads",
        file=url,
        found=str(error)[:300],
        hint="check the permissions s3:ListBucketMultipartUploads and s3:AbortMultipartUpload, and the network",
    )
