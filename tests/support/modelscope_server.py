"""A server on loopback with the part of ModelScope's HTTP API that reading a model needs.

It behaves as the source of ModelScope's client says (modelscope_hub 0.5.1): a listing with SHA-256, a redirect to a
store for large files, and small files sent whole, whatever range is requested.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from support.loopback import Loopback

LFS_BYTES = 20_000
"""Files of at least this size are in the store."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class ModelScope:
    """The service.

    Attributes:
        url: of the service; the store has another name of the same server.
        files: model -> revision -> path -> contents.
        token: that requests must bring; None for public models.
        busy: that many requests are refused with 429.
        breaks: that many bodies of the store end in the middle.
        expire_after: a signed address serves that many requests; 0 for any number.
        code: the Code in the JSON of a listing.
        lists_hashes: the listing has SHA-256.
        linked_hash: X-Linked-ETag instead of the right one.
        requests: method, path and range of each request.
        sent: bytes of all bodies.
    """

    url: str = ""
    store_url: str = ""
    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    token: str | None = None
    busy: int = 0
    breaks: int = 0
    expire_after: int = 0
    code: int = 200
    lists_hashes: bool = True
    linked_hash: str | None = None
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    signed: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def publish(self, repo: str, folder: Path, revision: str = "master") -> None:
        """Put the files of a folder into a model."""
        self.files.setdefault(repo, {})[revision] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def ranges(self) -> list[str]:
        """The ranges that were requested."""
        return [stated for method, _, stated in self.requests if method == "GET" and stated]


@contextmanager
def modelscope() -> Iterator[ModelScope]:
    """Run the service and its store."""
    service = ModelScope()

    class Handler(Loopback, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with service.lock:
                service.requests.append((self.command, self.path, self.headers.get("Range", "")))
                busy, service.busy = service.busy > 0, max(service.busy - 1, 0)
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if url.path.startswith("/store/"):
                self._store(url.path.rpartition("/")[2], query["Signature"])
                return
            bearer, cookie = self.headers.get("Authorization"), self.headers.get("Cookie")
            if busy:
                self._send(429)
            elif service.token is not None and (bearer, cookie) != (
                f"Bearer {service.token}",
                f"m_session_id={service.token}",
            ):
                self._json({"Code": 10990101, "Message": "access denied", "Success": False}, 403)
            elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", url.path):
                self._list(match[1], query)
            elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", url.path):
                self._file(match[1], query)
            else:
                self._missing()

        do_HEAD = do_GET  # noqa: N815

        def _list(self, repo: str, query: dict[str, str]) -> None:
            files = service.files.get(repo, {}).get(query["Revision"])
            if files is None:
                self._missing()
                return
            assert query["Recursive"] == "True"
            folders = {name.rpartition("/")[0] for name in files} - {""}
            rows = [{"Path": name, "Name": name, "Type": "tree", "Size": 0, "Sha256": ""} for name in folders]
            rows += [
                {"Path": name, "Name": name.rpartition("/")[2], "Type": "blob", "Size": len(data)}
                | ({"Sha256": sha256(data)} if service.lists_hashes else {})
                for name, data in files.items()
            ]
            self._json({"Code": service.code, "Data": {"Files": rows}, "Message": "a message", "Success": True})

        def _file(self, repo: str, query: dict[str, str]) -> None:
            data = service.files.get(repo, {}).get(query["Revision"], {}).get(query["FilePath"])
            if data is None:
                self._missing()
            elif len(data) < LFS_BYTES:
                self._send(200, data)
            else:
                with service.lock:
                    number = str(len(service.signed))
                    service.signed[number] = 0
                address = f"{service.store_url}/store/{sha256(data)}?Signature={number}"
                self._send(302, b"", {"Location": address})

        def _store(self, name: str, signature: str) -> None:
            assert self.headers.get("Authorization") is None, "a token left the service"
            assert self.headers.get("Cookie") is None, "a cookie left the service"
            every = (
                data for revisions in service.files.values() for files in revisions.values() for data in files.values()
            )
            data = next(data for data in every if sha256(data) == name)
            with service.lock:
                service.signed[signature] += 1
                expired = 0 < service.expire_after < service.signed[signature]
                breaking = service.breaks > 0 and not expired
                service.breaks -= breaking
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            if expired or match is None:
                self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
                return
            start, end = int(match[1]), min(int(match[2]) + 1, len(data))
            self._send(
                206,
                data[start:end],
                {
                    "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
                    "ETag": f'"{name[:32]}"',
                    "X-Linked-ETag": f'"{service.linked_hash or name}"',
                },
                cut=breaking,
            )

        def _missing(self) -> None:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)

        def _json(self, value: object, status: int = 200) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(
            self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            body = body[: len(body) // 2] if cut else body
            service.sent += len(body)
            self.wfile.write(body)
            if cut:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port = server.server_address[1]
    service.url, service.store_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
