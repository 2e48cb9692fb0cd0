"""What the HTTP servers of tests share."""

from __future__ import annotations


class Loopback:
    """The first base of a handler: it keeps connections open and logs nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """Otherwise a body waits up to 40 ms until the client acknowledges its header."""

    def log_message(self, *_: object) -> None: ...
