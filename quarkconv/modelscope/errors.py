"""Failed requests to ModelScope as errors of quarkconv."""

from __future__ import annotations

import re
from typing import Any, Final

from quarkconv.errors import HubError
from quarkconv.files import http

ENDPOINT_HINT: Final = "check MODELSCOPE_ENDPOINT"
_TOKEN_HINT: Final = "for a private model set MODELSCOPE_API_TOKEN"
_QUERY: Final = re.compile(r"(https?://[^\s'\"?<>]+)\?[^\s'\"<>]*")


def failure(error: Exception, file: str) -> HubError:
    """The error for a failed request about a file, or about the model."""
    response = getattr(error, "response", None)
    lines = _QUERY.sub(r"\1", str(error)).strip().splitlines() or [type(error).__name__]
    found = lines[0][:300]
    if response is not None:
        return refusal(response.status_code, _message(response) or found, file)
    if isinstance(error, http.client().TransportError | OSError):
        proxy = http.proxy_for(http.url_of(error) or "https://modelscope.cn")
        through = "" if proxy is None else f", and {proxy.variable}, which is {proxy.address}"
        return HubError(
            "ModelScope cannot be reached",
            file=file,
            found=found,
            hint=f"check the network and MODELSCOPE_ENDPOINT{through}; then run the same command again",
        )
    return HubError("The response is not from ModelScope", file=file, found=found, hint=ENDPOINT_HINT)


def refusal(status: int, found: str, file: str) -> HubError:
    """The error for a response with a status of refusal."""
    if status == 404:
        return HubError(
            "ModelScope has no such model, revision or file",
            file=file,
            expected="modelscope://org/name or modelscope://org/name@revision, which you can read",
            found=found,
            hint=f"check the name; {_TOKEN_HINT}",
        )
    if status in (401, 403):
        return HubError("ModelScope refuses access", file=file, found=found, hint=_TOKEN_HINT)
    return HubError(
        "ModelScope refused a request", file=file, found=found, hint="wait a moment, then run the same command again"
    )


def _message(response: Any) -> str:
    """What the service says in its JSON about a refusal."""
    try:
        body = response.json()
    except Exception:  # another body, or one that was not read
        return ""
    message = body.get("Message") if isinstance(body, dict) else None
    return f"{response.status_code} {message}"[:300] if isinstance(message, str) else ""
