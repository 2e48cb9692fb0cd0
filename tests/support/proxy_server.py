"""A forward proxy on loopback, as companies run them: it takes absolute addresses, or CONNECT for a tunnel.

It resolves server names that exist nowhere else, so that every request they get came through it.
"""

from __future__ import annotations

import base64
import select
import socket
import threading
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from support.loopback import Loopback


@dataclass
class Proxy:
    """What it knows, what it saw, and what it does wrong.

    Attributes:
        hosts: name of a host -> its port on loopback; other names are looked up.
        login: ``user:password`` that it wants.
        refuse: status with which it refuses everything; None refuses nothing.
        busy: how many requests it refuses with 502.
        page: what it answers to everything, as proxies do that want a login in a browser.
        cuts: how many answers it cuts after ``cut_after`` bytes of body, or tunnels after as many bytes.
        requests: method, address and Range of every request that it was given.
        peers: the ports that its own requests came from.
    """

    hosts: dict[str, int] = field(default_factory=dict)
    login: str | None = None
    refuse: int | None = None
    busy: int = 0
    page: bytes | None = None
    cuts: int = 0
    cut_after: int = 0
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    peers: set[int] = field(default_factory=set)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def address_of(self, host: str, port: int) -> tuple[str, int]:
        return ("127.0.0.1", self.hosts[host]) if host in self.hosts else (host, port)

    def cut(self) -> bool:
        """Whether the answer under way is to be cut."""
        with self.lock:
            cuts_now = self.cuts > 0
            self.cuts -= cuts_now
            return cuts_now


class _Handler(Loopback, BaseHTTPRequestHandler):
    proxy: Proxy

    def do_GET(self) -> None:
        self._forward()

    def do_HEAD(self) -> None:
        self._forward()

    def do_CONNECT(self) -> None:
        if self._refused():
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection(self.proxy.address_of(host, int(port))) as server:
            self.proxy.peers.add(server.getsockname()[1])
            self.send_response(200, "Connection established")
            self.end_headers()
            _tunnel(self.connection, server, self.proxy.cut_after if self.proxy.cut() else None)
        self.close_connection = True

    def _refused(self) -> bool:
        proxy = self.proxy
        with proxy.lock:
            proxy.requests.append((self.command, self.path, self.headers.get("Range", "")))
        login_text = (self.headers.get("Proxy-Authorization") or "").removeprefix("Basic ")
        status = proxy.refuse
        with proxy.lock:
            proxy.busy -= 1
            status = 502 if proxy.busy >= 0 else status
        if proxy.login is not None and base64.b64decode(login_text).decode() != proxy.login:
            status = 407
        if status is None and proxy.page is None:
            return False
        self.send_response(status or 200)
        if status == 407:
            self.send_header("Proxy-Authenticate", 'Basic realm="proxy"')
        self._end(proxy.page or b"")
        return True

    def _forward(self) -> None:
        if self._refused():
            return
        address = urlsplit(self.path)
        server_address = self.proxy.address_of(address.hostname or "", address.port or 80)
        server = HTTPConnection(*server_address, timeout=10)
        server.connect()
        self.proxy.peers.add(server.sock.getsockname()[1])
        drop = ("proxy-authorization", "proxy-connection", "connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        path = address.path + (f"?{address.query}" if address.query else "")
        server.request(self.command, path, headers=headers)
        answer = server.getresponse()
        body = answer.read()
        server.close()
        self.send_response(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = None if self.command != "HEAD" else answer.headers.get("Content-Length")
        self._end(body, length)

    def _end(self, body: bytes, length: str | None = None) -> None:
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.command == "GET" and self.proxy.cut()
        self.wfile.write(body[: self.proxy.cut_after] if cut else body)
        self.close_connection = cut


def _tunnel(one: socket.socket, other: socket.socket, budget: int | None) -> None:
    """Carry bytes both ways until an end closes, or until ``budget`` bytes came back."""
    while True:
        for source in select.select([one, other], [], [])[0]:
            data = source.recv(65536)
            if not data:
                return
            if source is other and budget is not None:
                data = data[:budget]
                budget -= len(data)
            (other if source is one else one).sendall(data)
            if budget == 0:
                return


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None: ...  # clients that go away


def start_proxy() -> tuple[Proxy, ThreadingHTTPServer]:
    """Start a proxy; the server is to be shut down."""
    proxy = Proxy()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return proxy, server
