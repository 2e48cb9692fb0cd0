"""Failed requests to the Hub as errors of quarkconv."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from quarkconv.errors import HubError
from quarkconv.files.http import client, proxy_for, url_of

TOKEN_HINT: Final = "for a private or gated repo run `hf auth login`, or set HF_TOKEN"
_RETRY_HINT: Final = "wait a moment, then run the same command again"
_QUERY: Final = re.compile(r"(https?://[^\s'\"?<>]+)\?[^\s'\"<>]*")
_SECRET: Final = re.compile(r"Bearer [^'\"]*")
_PROXY_LOGIN: Final = 407


def hub_error(error: Exception, repo: str, file: str | None = None) -> HubError:
    """The error for a failed request.

    Args:
        error: raised by huggingface_hub or its HTTP client.
        repo: the repo id, with its revision if one was given.
        file: the requested file.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = _first_cause(error, LocalEntryNotFoundError)
    name = repo if file is None else f"{repo}/{file}"
    page = f"{constants.ENDPOINT}/{repo.partition('@')[0]}"
    found = first_line(error)
    message, expected, hint = "", None, None
    if isinstance(error, GatedRepoError):
        message = "The repo is gated, and you have no access to it"
        hint = f"request access at {page}, then run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        message = "The model is neither a local directory nor a repo on the Hub"
        expected, hint = "a directory, or a repo id that you can read", f"check the name; {TOKEN_HINT}"
    elif isinstance(error, RevisionNotFoundError):
        message, expected = "The repo has no such revision", "a branch, a tag or a commit"
        hint = f"see {page}/commits/main"
    elif isinstance(error, RemoteEntryNotFoundError):
        message, hint = "The repo has no such file", "run the command again"
    elif isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        message = "The Hub cannot be reached, and its cache does not hold this model"
        hint = "unset HF_HUB_OFFLINE, or download the model first with `hf download`"
    elif isinstance(error, UnicodeEncodeError | client().LocalProtocolError):
        message, expected = "Invalid token", "letters, digits and _"
        found, hint = "characters that an HTTP header cannot contain", "set HF_TOKEN again, or run `hf auth login`"
    elif isinstance(error, HfHubHTTPError):
        return _refused(error, error.response.status_code, name, found)
    elif isinstance(error, client().TooManyRedirects | RecursionError):  # huggingface_hub 1 recurses on redirects
        message, hint = "The Hub redirects in a loop", _endpoint_hint()
    elif isinstance(error, RuntimeError):  # of hf_xet
        message = "Download from Xet storage failed"
        hint = "set HF_HUB_DISABLE_XET=1 to download over HTTP, or leave out --cache"
    elif isinstance(error, client().TransportError | OSError) and not isinstance(error, FileMetadataError):
        return _unreachable(error, name, found)
    elif isinstance(error, ImportError | client().InvalidURL) or "proxy URL" in found:
        return _unusable_proxy(name, found)
    else:
        message, hint = "The response is not from a Hub", _endpoint_hint()
        expected = f"the response of a Hub at {constants.ENDPOINT}"
    return HubError(message, file=name, expected=expected, found=found, hint=hint)


def network_hint(error: Exception) -> str | None:
    """The hint where the network or a proxy blocks a request; None where the Hub responded."""
    response = getattr(error, "response", None)
    blocked = isinstance(error, client().TransportError) if response is None else response.status_code == _PROXY_LOGIN
    return hub_error(error, "").hint if blocked else None


def first_line(error: Exception) -> str:
    """The first line of an error's message, without signatures of URLs and without tokens."""
    lines = str(error).strip().splitlines()
    text = _SECRET.sub("Bearer ...", _QUERY.sub(r"\1", lines[0])) if lines else type(error).__name__
    return text[:300]


def _first_cause(error: Exception, kind: type[Exception]) -> Exception:
    """The error that led huggingface_hub to its cache, which does not hold the file."""
    while isinstance(error, kind) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _refused(error: Exception, status: int, name: str, found: str) -> HubError:
    """A response with a status of refusal."""
    from huggingface_hub import constants

    url = url_of(error) or constants.ENDPOINT
    proxy, server = proxy_for(url), urlsplit(url).netloc
    message, expected = "The Hub refused a request", None
    hint = TOKEN_HINT if status in (401, 403) else _RETRY_HINT
    if status == _PROXY_LOGIN and proxy is not None:
        message, expected = "The proxy refused a request to the Hub", f"access through {proxy.address}"
        hint = _login_hint(proxy.variable)
    elif server != urlsplit(constants.ENDPOINT).netloc:
        through = "" if proxy is None else f" ({proxy.variable} is {proxy.address})"
        message, expected = "The Hub's store refused a request", f"a response from {server}"
        hint = f"run the same command again; if it fails again, the connection to the store is blocked{through}"
    return HubError(message, file=name, expected=expected, found=found, hint=hint)


def _unreachable(error: Exception, name: str, found: str) -> HubError:
    """No response."""
    from huggingface_hub import constants

    url = url_of(error) or constants.ENDPOINT
    server = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    proxy = proxy_for(url)
    message, expected = "The Hub cannot be reached", f"a response from {server}"
    hint = "check the network (HF_ENDPOINT, HTTPS_PROXY), then run the same command again"
    if "CERTIFICATE_VERIFY_FAILED" in found:
        message, expected = "The certificate of the Hub is not trusted", f"the certificate of {server}"
        hint = "if a proxy issues its own certificates, set SSL_CERT_FILE to the file of its authority"
    elif proxy is not None:
        message, expected = "The Hub cannot be reached through the proxy", f"{expected} through {proxy.address}"
        hint = f"check {proxy.variable}, or add {urlsplit(url).hostname} to NO_PROXY; then run the same command again"
        if found.startswith(str(_PROXY_LOGIN)):
            hint = _login_hint(proxy.variable)
    return HubError(message, file=name, expected=expected, found=found, hint=hint)


def _unusable_proxy(name: str, found: str) -> HubError:
    from huggingface_hub import constants

    proxy = proxy_for(constants.ENDPOINT)
    variables = "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY" if proxy is None else proxy.variable
    hint = f"check {variables}; a socks URL requires the Python package socksio"
    return HubError("The proxy cannot be used", file=name, expected="http://HOST:PORT", found=found, hint=hint)


def _login_hint(variable: str) -> str:
    return f"{variable} needs a user and password: http://USER:PASSWORD@HOST:PORT"


def _endpoint_hint() -> str:
    """The hint where another server responds instead of a Hub."""
    from huggingface_hub import constants

    proxy = proxy_for(constants.ENDPOINT)
    through = "" if proxy is None else f", and {proxy.variable}, which is {proxy.address}"
    return f"check HF_ENDPOINT, which is {constants.ENDPOINT}{through}"
