"""The HTTP client of huggingface_hub: which errors are transient, when to retry, which proxy it uses."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

RETRIES: Final = 5
"""Retries of a request, or of a transfer that makes no progress, before it fails."""
FIRST_WAIT: Final = 1.0
"""Seconds before the first retry; each further one waits twice as long."""
LONGEST_WAIT: Final = 8.0
LONGEST_REQUESTED: Final = 600.0
"""The longest pause, in seconds, that a server may request; the Hub limits requests in windows of five minutes."""
_PERMANENT: Final = re.compile(r"4\d\d\b")  # errors of a proxy start with its status: 407 and 403 stay, 502 may pass

Result = TypeVar("Result")


class Proxy(NamedTuple):
    """A proxy from the environment: the variable that sets it, and its address without user and password."""

    variable: str
    address: str


@cache
def client() -> Any:
    """The module of the client: httpx, or httpx2 since version 2 of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__bases__[0].__module__]


def retried(
    request: Callable[[], Result],
    pause: Callable[[Exception, int], float | None],
    received: Callable[[], int] = lambda: 0,
) -> Result:
    """Make a request until it succeeds.

    Args:
        request: makes it.
        pause: the seconds to wait before a retry, from the error and the number of failures in a row, from 1 on; None
            to raise the error.
        received: the bytes that have arrived so far; more of them start a new row of failures.
    """
    failures, before = 0, received()
    while True:
        try:
            return request()
        except Exception as error:
            now = received()
            failures, before = 1 if now > before else failures + 1, now
            seconds = pause(error, failures)
            if seconds is None:
                raise
        time.sleep(seconds)


def is_transient(error: Exception) -> bool:
    """Whether a retry may succeed: there was no response, or only a part of one."""
    if isinstance(error, client().ProxyError):
        return _PERMANENT.match(str(error)) is None
    return isinstance(error, (client().TimeoutException, client().NetworkError, client().RemoteProtocolError))


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row, from 1 on."""
    return min(FIRST_WAIT * 2.0 ** (failures - 1), LONGEST_WAIT)


def requested_pause(headers: Mapping[str, str]) -> float | None:
    """The pause in seconds that a response requests, in Retry-After or, as the Hub does, in RateLimit."""
    limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})\b", headers.get("RateLimit", ""))
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", ""))
    found = limit or after
    return None if found is None else float(found[1])


def url_of(error: Exception) -> str | None:
    """The URL of the request that failed."""
    holders: tuple[Any, ...] = (getattr(error, "response", None), error)
    for holder in holders:
        try:
            return str(holder.request.url)
        except (AttributeError, RuntimeError):  # not an error of the client, or one without a request
            continue
    return None


def proxy_for(url: str) -> Proxy | None:
    """The proxy of requests to a URL; None for a direct connection."""
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(url), getproxies()
    if proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None:
        return None
    value = proxies[scheme]
    names = [name for name in os.environ if name.lower() == f"{scheme}_proxy" and os.environ[name] == value]
    before, slashes, rest = value.rpartition("://")
    shown = f"{before}{slashes}{rest.partition('/')[0].rpartition('@')[2]}"
    return Proxy(min(names, default="the system's settings"), shown)
