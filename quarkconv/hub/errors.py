"""What the Hub answers when it does not answer, in the words of this tool."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from quarkconv.errors import HubError
from quarkconv.hub.http import client, proxy_for, url_of

TOKEN_HINT = "for a private or gated repo run `hf auth login`, or set HF_TOKEN"
_QUERY: Final = re.compile(r"(https?://[^\s'\"?<>]+)\?[^\s'\"<>]*")
_SECRET: Final = re.compile(r"Bearer [^'\"]*")
_NEEDS_LOGIN: Final = 407


def hub_error(error: Exception, place: str, file: str | None = None) -> HubError:
    """The error for a failed request.

    Args:
        error: what huggingface_hub or its HTTP client raised.
        place: the repo, with its revision where one was asked for.
        file: the file that was asked for.
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
    named = place if file is None else f"{place}/{file}"
    found = first_line(error)
    if isinstance(error, GatedRepoError):
        return HubError(
            "The repo is gated, and you have no access to it", file=named, found=found,
            hint=f"ask for access at {constants.ENDPOINT}/{place.partition('@')[0]}, then run `hf auth login` or set "
            "HF_TOKEN",
        )  # fmt: skip
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return HubError(
            "The model is neither a local directory nor available from the Hub", file=named,
            expected="a directory, or a repo id that you can read", found=found, hint=f"check the name; {TOKEN_HINT}",
        )  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            "The repo has no such revision", file=named, expected="a branch, a tag or a commit", found=found,
            hint=f"see {constants.ENDPOINT}/{place.partition('@')[0]}/commits/main",
        )  # fmt: skip
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError("The repo has no such file", file=named, found=found, hint="give the command again")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return HubError(
            "The Hub cannot be asked, and the cache does not have this model", file=named, found=found,
            hint="unset HF_HUB_OFFLINE, or download the model before with `hf download`",
        )  # fmt: skip
    if isinstance(error, UnicodeEncodeError | client().LocalProtocolError):
        return HubError(
            "A request to the Hub cannot be written", file=named, expected="a token of letters, digits and _",
            found="a token that no header can hold", hint="set HF_TOKEN again, or run `hf auth login`",
        )  # fmt: skip
    if isinstance(error, HfHubHTTPError):
        return _refused(error, error.response.status_code, named, found)
    if isinstance(error, client().TooManyRedirects | RecursionError):  # huggingface_hub 1 called itself for each
        return HubError("The Hub's answers lead in a circle", file=named, found=found, hint=_endpoint_hint())
    if isinstance(error, RuntimeError):  # what hf_xet raises
        return HubError(
            "The files cannot be had from Xet storage", file=named, found=found,
            hint="set HF_HUB_DISABLE_XET=1 to download them as any others, or leave out --cache",
        )  # fmt: skip
    if isinstance(error, client().TransportError | OSError) and not isinstance(error, FileMetadataError):
        return _unreachable(error, named, found)
    if isinstance(error, ImportError | client().InvalidURL) or "proxy URL" in found:
        return _unusable_proxy(named, found)
    return HubError(
        "The Hub's answer is not that of a Hub", file=named,
        expected=f"the answer of a Hub at {constants.ENDPOINT}", found=found, hint=_endpoint_hint(),
    )  # fmt: skip


def network_hint(error: Exception) -> str | None:
    """What to do where the network, or a proxy, keeps a request from the Hub; None where the Hub answered."""
    response = getattr(error, "response", None)
    in_between = (
        isinstance(error, client().TransportError) if response is None else response.status_code == _NEEDS_LOGIN
    )
    return hub_error(error, "").hint if in_between else None


def first_line(error: Exception) -> str:
    """What an error says, in one line, without signatures of addresses and without tokens."""
    lines = str(error).strip().splitlines()
    text = _SECRET.sub("Bearer ...", _QUERY.sub(r"\1", lines[0])) if lines else type(error).__name__
    return text[:300]


def _first_cause(error: Exception, kind: type[Exception]) -> Exception:
    """What made huggingface_hub look into the cache, and then say that the cache does not have it."""
    while isinstance(error, kind) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _refused(error: Exception, status: int, named: str, found: str) -> HubError:
    """A request was answered, with a status that says no."""
    from huggingface_hub import constants

    url = url_of(error) or constants.ENDPOINT
    proxy = proxy_for(url)
    if status == _NEEDS_LOGIN and proxy is not None:
        return HubError(
            "The proxy refused a request to the Hub", file=named, expected=f"a way through {proxy.address}",
            found=found, hint=f"{proxy.variable} needs a user and password: http://USER:PASSWORD@HOST:PORT",
        )  # fmt: skip
    server = urlsplit(url)
    if server.netloc != urlsplit(constants.ENDPOINT).netloc:
        through = "" if proxy is None else f" ({proxy.variable} is {proxy.address})"
        return HubError(
            "The Hub's store refused a request", file=named, expected=f"an answer from {server.netloc}", found=found,
            hint=f"give the same command again; if it stays so, something on the way to it says no{through}",
        )  # fmt: skip
    hint = TOKEN_HINT if status in (401, 403) else "wait a little, then give the same command again"
    return HubError("The Hub refused a request", file=named, found=found, hint=hint)


def _unreachable(error: Exception, named: str, found: str) -> HubError:
    """Nobody answered."""
    from huggingface_hub import constants

    url = url_of(error) or constants.ENDPOINT
    server = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    proxy = proxy_for(url)
    if "CERTIFICATE_VERIFY_FAILED" in found:
        return HubError(
            "The certificate of the Hub is not one to trust", file=named, expected=f"that of {server}", found=found,
            hint="where a proxy has certificates of its own, name the file of its authority in SSL_CERT_FILE",
        )  # fmt: skip
    if proxy is None:
        return HubError(
            "The Hub cannot be reached", file=named, expected=f"an answer from {server}", found=found,
            hint="check the network (HF_ENDPOINT, HTTPS_PROXY), then give the same command again",
        )  # fmt: skip
    hint = f"check {proxy.variable}, or name {urlsplit(url).hostname} in NO_PROXY; then give the same command again"
    if found.startswith(str(_NEEDS_LOGIN)):
        hint = f"{proxy.variable} needs a user and password: http://USER:PASSWORD@HOST:PORT"
    return HubError(
        "The Hub cannot be reached through the proxy", file=named,
        expected=f"an answer from {server} through {proxy.address}", found=found, hint=hint,
    )  # fmt: skip


def _unusable_proxy(named: str, found: str) -> HubError:
    from huggingface_hub import constants

    proxy = proxy_for(constants.ENDPOINT)
    where = "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY" if proxy is None else proxy.variable
    return HubError(
        "The proxy cannot be used", file=named, expected="http://HOST:PORT", found=found,
        hint=f"check {where}; an address that starts with socks needs the Python package socksio",
    )  # fmt: skip


def _endpoint_hint() -> str:
    """What to do where something answers that is no Hub."""
    from huggingface_hub import constants

    proxy = proxy_for(constants.ENDPOINT)
    through = "" if proxy is None else f", and {proxy.variable}, which is {proxy.address}"
    return f"check HF_ENDPOINT, which is {constants.ENDPOINT}{through}"
