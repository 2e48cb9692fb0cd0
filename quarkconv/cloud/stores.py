"""Opening an object store, and the words for its failures. Shared by reading and writing.

obstore (the object_store crate of Apache Arrow) handles endpoints, regions, signatures, and retries with backoff. Its
credentials come from the environment; for S3 without a key there, from boto3, which knows profiles, single sign-on and
the roles of instances and containers.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from quarkconv.errors import UsageError
from quarkconv.files.arenas import limit_arenas
from quarkconv.files.urls import SCHEMES

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RETRIES: Final = 8
_PATIENCE: Final = timedelta(minutes=3)
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_CREDENTIALS: Final = {
    "s3://": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL",
    "gs://": "GOOGLE_APPLICATION_CREDENTIALS",
    "az://": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_OWN_CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
"""With one of these, obstore needs no help."""
_STATUS: Final = re.compile(r"status code: (\d{3}[^:<\n]*)|<Code>([A-Za-z]+)</Code>")
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_NO_CHECKSUM: Final = ("Content-MD5", "required", "Object Lock")
_CLOCK: Final = "RequestTimeTooSkewed"
_REFUSALS: Final = ("401", "403", "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")


class Failure(NamedTuple):
    """A failed request in words: what happened, the cause in one line, and what to do next."""

    message: str
    found: str
    hint: str


def open_store(url: str) -> ObjectStore:
    """Open the object store of a URL, without a request to it.

    Args:
        url: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``, without a slash at the end.

    Raises:
        UsageError: obstore is not installed, the URL is invalid, or there are no credentials.
    """
    try:
        import obstore  # noqa: F401
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(
            "Object stores need obstore",
            expected="obstore",
            found="not installed",
            hint="pip install obstore",
        ) from error
    limit_arenas()
    if not bucket_of(url):
        raise _invalid(url)
    try:
        return from_url(
            url,
            retry_config={"max_retries": RETRIES, "retry_timeout": _PATIENCE},
            client_options={"allow_http": True} if _plain_http() else None,
            **_credentials(url),
        )
    except UsageError:
        raise
    except Exception as error:  # obstore has no common class for these
        raise _invalid(url) from error


def _invalid(url: str) -> UsageError:
    return UsageError(
        "Invalid URL of an object store", expected="s3://bucket/path, gs:// or az://", found=repr(url)[:300]
    )


def prefix_of(url: str) -> str:
    """The path of a URL inside its bucket; empty for a whole bucket."""
    return url.partition("://")[2].partition("/")[2]


def bucket_of(url: str) -> str:
    """The bucket of a URL."""
    return url.partition("://")[2].partition("/")[0]


def failure_of(error: Exception, url: str, doing: str) -> Failure:
    """The words for a failed request.

    Args:
        error: of obstore, or an OSError.
        url: of the model.
        doing: what failed, as the end of a sentence: ``read``.
    """
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    scheme = next(scheme for scheme in SCHEMES if url.startswith(scheme))
    text, found = str(error), _first_line(error)
    if any(code in text for code in _NO_BUCKET):
        return Failure("The bucket does not exist", found, "check its name, and the endpoint")
    if all(word in text for word in _NO_CHECKSUM):
        return Failure(
            "The bucket demands checksums of uploads, as object lock does", found, "set AWS_CHECKSUM_ALGORITHM=SHA256"
        )
    if _CLOCK in text:
        return Failure("The clock of this machine differs from that of the object store", found, "set the clock")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or any(code in found for code in _REFUSALS):
        return Failure("The object store refuses access", found, f"check the credentials: {_CREDENTIALS[scheme]}")
    return Failure(f"The object store cannot be {doing}", found, f"check {_CREDENTIALS[scheme]} and the network")


def _plain_http() -> bool:
    """Whether the user chose an endpoint without TLS, as local servers have it; obstore requires a second consent."""
    return any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


def _credentials(url: str) -> dict[str, Any]:
    """Options of the store that supply credentials which obstore does not find by itself."""
    if not url.startswith("s3://") or any(os.environ.get(name) for name in _OWN_CREDENTIALS):
        return {}
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:  # obstore still knows the roles of instances and containers
        return {}
    try:
        return {"credential_provider": Boto3CredentialProvider(boto3.Session())}
    except Exception as error:  # no credentials, no such profile, or a login that has expired
        raise UsageError(
            "There are no credentials for the object store",
            file=url,
            expected=_CREDENTIALS["s3://"],
            found="none" if isinstance(error, ValueError) else str(error)[:300],
            hint="set them, log in with the store's own tools, or AWS_SKIP_SIGNATURE=true for a public bucket",
        ) from error


def _first_line(error: Exception) -> str:
    """The cause of an error of obstore in one line: status and code of a response, or the first line of its message."""
    text = str(error)
    parts = [part for match in _STATUS.finditer(text) for part in match.groups() if part]
    return ": ".join(dict.fromkeys(parts)) if parts else (text.strip().splitlines() or [type(error).__name__])[0][:300]
