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
from urllib.parse import quote

from quarkconv.errors import UsageError
from quarkconv.files.arenas import limit_arenas
from quarkconv.files.urls import bucket_of, prefix_of, scheme_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RETRIES: Final = 8
_RETRY_TIMEOUT: Final = timedelta(minutes=3)
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_PREFIXES: Final = {"s3://": "AWS_", "gs://": "GOOGLE_", "az://": "AZURE_"}
_CREDENTIALS: Final = {
    "s3://": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL",
    "gs://": "GOOGLE_APPLICATION_CREDENTIALS",
    "az://": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_OWN_CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
"""With one of these, obstore needs no help."""
_VARIABLES: Final = {
    "s3://": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "gs://": (),
    "az://": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
}
"""What goes into the headers of requests."""
_ENDPOINT: Final = re.compile(r"https?://[^\s/?#]+[^\s?#]*", re.IGNORECASE)
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STATUS: Final = re.compile(r"status code: (\d{3}[^:<\n]*)|<Code>([A-Za-z]+)</Code>")
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_NO_CHECKSUM: Final = ("Content-MD5", "required", "Object Lock")
_CLOCK: Final = "RequestTimeTooSkewed"
_OTHER_REGION: Final = ("AuthorizationHeaderMalformed", "PermanentRedirect", "incorrectly configured region")
_REFUSALS: Final = ("401", "403", "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")


class Failure(NamedTuple):
    """A failed request in words: what happened, the cause in one line, and what to do next."""

    message: str
    found: str
    hint: str


def open_store(url: str) -> ObjectStore:
    """Open the object store of a URL, without a request to it.

    Args:
        url: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``, without a slash at the end. The path
            is taken as it is, without percent escapes.

    Raises:
        UsageError: obstore is not installed, the URL is invalid, there are no credentials, or a variable of the
            environment is invalid.
    """
    try:
        import obstore  # noqa: F401
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(
            "Object stores need obstore",
            expected="obstore",
            found="not installed",
            hint="pip install obstore boto3",
        ) from error
    limit_arenas()
    scheme, bucket, path = scheme_of(url), bucket_of(url), prefix_of(url)
    if not (_BUCKET.fullmatch(bucket) and url.isprintable() and all(map(_is_name, path.split("/") if path else ()))):
        raise _invalid(url)
    _check_environment(scheme)
    try:
        return from_url(
            f"{scheme}{bucket}/{quote(path)}",
            retry_config={"max_retries": RETRIES, "retry_timeout": _RETRY_TIMEOUT},
            client_options={"allow_http": True} if _plain_http() else None,
            **_credentials(url),
        )
    except UsageError:
        raise
    except Exception as error:  # obstore has no common class for these
        if "Account must be specified" in str(error):
            raise UsageError(
                "The account of the object store is not set",
                file=url,
                expected=_CREDENTIALS[scheme],
                found="none",
                hint="set them",
            ) from error
        raise _invalid(url) from error


def _is_name(part: str) -> bool:
    return part not in ("", ".", "..")


def _check_environment(scheme: str) -> None:
    """Refuse endpoints and credentials with which no request can be made; a value that may be secret is not shown.

    Raises:
        UsageError: a variable of the environment is invalid.
    """
    for name in _ENDPOINTS:
        value = os.environ.get(name)
        if value is not None and name.startswith(_PREFIXES[scheme]) and not _ENDPOINT.fullmatch(value):
            raise UsageError(
                "The endpoint of the object store is not a URL",
                expected="http://HOST:PORT or https://HOST",
                found=f"{name}={value!r}"[:300],
                hint=f"set or unset {name}",
            )
    for name in _VARIABLES[scheme]:
        value = os.environ.get(name, "")
        if not (value.isascii() and value.isprintable()):
            raise UsageError(
                f"{name} has a line break or another character that a request cannot contain",
                expected="printable ASCII characters",
                hint=f"set {name} again; a file may have a line break at its end",
            )


def _invalid(url: str) -> UsageError:
    return UsageError(
        "Invalid URL of an object store", expected="s3://bucket/path, gs:// or az://", found=repr(url)[:300]
    )


def failure_of(error: Exception, url: str, doing: str) -> Failure:
    """The words for a failed request.

    Args:
        error: of obstore, or an OSError.
        url: of the model.
        doing: what failed, as the end of a sentence: ``read``.
    """
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    scheme = scheme_of(url)
    text, found = str(error), _first_line(error)
    if any(code in text for code in _NO_BUCKET):
        return Failure("The bucket does not exist", found, "check its name, and the endpoint")
    if all(word in text for word in _NO_CHECKSUM):
        return Failure(
            "The bucket requires checksums for uploads, as object lock does", found, "set AWS_CHECKSUM_ALGORITHM=SHA256"
        )
    if any(code in text for code in _OTHER_REGION):
        return Failure("The bucket is in another region", found, "set AWS_REGION to its region")
    if _CLOCK in text:
        return Failure("The clock of this machine differs from the object store's", found, "set the clock")
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
            "Credentials for the object store are missing",
            file=url,
            expected=_CREDENTIALS["s3://"],
            found="none" if isinstance(error, ValueError) else str(error)[:300],
            hint="set them, log in with the store's own tools, or set AWS_SKIP_SIGNATURE=true for a public bucket",
        ) from error


def _first_line(error: Exception) -> str:
    """The cause of an error of obstore in one line: status and code of a response, or the first line of its message."""
    text = str(error)
    parts = [part for match in _STATUS.finditer(text) for part in match.groups() if part]
    return ": ".join(dict.fromkeys(parts)) if parts else (text.strip().splitlines() or [type(error).__name__])[0][:300]
