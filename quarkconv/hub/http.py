"""The HTTP client under huggingface_hub: which of its errors pass, how long to wait, which proxy it takes."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

RETRIES: Final = 5
"""Times that a request is made again, and that a broken transfer goes on where it broke, before it fails."""
FIRST_WAIT: Final = 1.0
"""Seconds before the first of them; it doubles each time."""
LONGEST_WAIT: Final = 8.0
LONGEST_ASKED: Final = 600.0
"""Seconds that a server may ask to be left alone; the Hub counts requests in windows of five minutes."""
_UNUSABLE: Final = re.compile(r"4\d\d\b")  # a proxy says its status first: 407, 403; a 502 may pass


class Proxy(NamedTuple):
    """A proxy of the environment: the variable that names it, and its address without user and password."""

    variable: str
    address: str


@cache
def client() -> Any:
    """The module of the client: httpx, from version 2 of huggingface_hub on httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__bases__[0].__module__]


def may_pass(error: Exception) -> bool:
    """Whether a request that failed so may succeed when it is made again: nothing was answered, or only a part."""
    if isinstance(error, client().ProxyError):
        return _UNUSABLE.match(str(error)) is None
    return isinstance(error, (client().TimeoutException, client().NetworkError, client().RemoteProtocolError))


def wait_before(attempt: int) -> float:
    """Seconds to wait before a request is made for the ``attempt``-th time again, from 1 on."""
    return min(FIRST_WAIT * 2.0 ** (attempt - 1), LONGEST_WAIT)


def wait_asked_for(headers: Any) -> float | None:
    """Seconds that an answer asks to wait, in Retry-After or, as the Hub does, in RateLimit."""
    limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})\b", headers.get("RateLimit", ""))
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", ""))
    found = limit or after
    return None if found is None else float(found[1])


def url_of(error: Exception) -> str | None:
    """The address that a request was for."""
    for holder in (getattr(error, "response", None), error):
        try:
            return str(holder.request.url)  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):  # no error of the client, or one from before there was a request
            continue
    return None


def proxy_for(url: str) -> Proxy | None:
    """The proxy that requests to an address go through; None where they go there directly."""
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
