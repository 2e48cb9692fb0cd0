"""An HTTP proxy in front of a server that corrupts some responses."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.loopback import Loopback

_HOP: tuple[str, ...] = ("connection", "transfer-encoding", "server", "date")


@dataclass
class FaultyProxy:
    """What the proxy does to requests for ranges.

    Attributes:
        upstream: host and port of the server.
        url: URL of the proxy.
        refuse: responses that become ``status``.
        status: 503 (slow down), 403 and so on.
        cut: responses whose body ends in the middle.
        lie: shift the bytes that are requested, and not what the response states.
        refuse_puts: uploads of objects and parts whose response becomes ``status``.
        reset_puts: uploads whose connection is reset in the middle of the body.
        lose_puts: uploads that succeed and whose connection is reset before the response.
        ignore_conditions: drop ``If-Match`` and ``If-None-Match``, as old stores do.
        refuse_conditions: answer uploads that have them with 501.
        deny: methods that are refused with 403, such as ``PUT``.
        deny_code: the code of that refusal.
        slow: seconds before each request is passed on.
        ranges: the requests for ranges.
        requests: method and path of every request.
    """

    upstream: str
    url: str = ""
    refuse: int = 0
    status: int = 503
    cut: int = 0
    lie: bool = False
    refuse_puts: int = 0
    reset_puts: int = 0
    lose_puts: int = 0
    ignore_conditions: bool = False
    refuse_conditions: bool = False
    deny: tuple[str, ...] = ()
    deny_code: str = "AccessDenied"
    slow: float = 0
    ranges: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, fault: str) -> bool:
        """Whether a fault that is counted down strikes."""
        with self.lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(left - 1, 0))
            return left > 0


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of ``http://HOST:PORT``."""
    proxy = FaultyProxy(upstream.removeprefix("http://"))

    class Handler(Loopback, BaseHTTPRequestHandler):
        def _forward(self) -> None:
            requested = self.headers.get("Range")
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            if "x-amz-checksum-sha256" in self.headers:  # S3 accepts it as a checksum; moto looks for this one
                headers["x-amz-sdk-checksum-algorithm"] = "SHA256"
            length = int(self.headers.get("Content-Length") or 0)
            with proxy.lock:
                proxy.requests.append((self.command, self.path))
            time.sleep(proxy.slow)
            if self.command == "PUT" and length and proxy.take("reset_puts"):
                self.rfile.read(length // 2)
                self._reset()
                return
            body = self.rfile.read(length) if length else None
            if self.command in proxy.deny:
                self._send(403, {}, f"<Error><Code>{proxy.deny_code}</Code></Error>".encode())
                return
            if self.command == "PUT" and proxy.take("refuse_puts"):
                self._send(proxy.status, {}, b"<Error><Code>SlowDown</Code></Error>")
                return
            conditions = {name for name in headers if name.lower() in ("if-match", "if-none-match")}
            if self.command == "PUT" and conditions and proxy.refuse_conditions:
                self._send(501, {}, b"<Error><Code>NotImplemented</Code></Error>")
                return
            if proxy.ignore_conditions:
                headers = {name: value for name, value in headers.items() if name not in conditions}
            if requested is not None:
                with proxy.lock:
                    proxy.ranges.append(requested)
                if proxy.take("refuse"):
                    self._send(proxy.status, {}, b"<Error><Code>SlowDown</Code></Error>")
                    return
                if proxy.lie:
                    first, _, last = requested.removeprefix("bytes=").partition("-")
                    headers["Range"] = f"bytes={int(first) + 1}-{int(last) + 1}"
            with closing(http.client.HTTPConnection(proxy.upstream, timeout=30)) as upstream:
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                body = response.read()
            if self.command == "PUT" and proxy.take("lose_puts"):
                self._reset()
                return
            kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP}
            cut = requested is not None and len(body) > 1 and proxy.take("cut")
            self._send(response.status, kept, body, cut=cut)

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
