"""A server with the part of Google's XML API that obstore writes and reads with, written from its documentation.

Objects have generations, uploads have parts, and writes are made on condition of a generation:
https://cloud.google.com/storage/docs/xml-api/reference-headers#xgoogifgenerationmatch and
https://cloud.google.com/storage/docs/multipart-uploads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class GoogleStore:
    """The objects of all buckets.

    Attributes:
        environment: what leads obstore there.
        objects: bucket and name -> generation and bytes.
        uploads: the parts of unfinished uploads.
        parts: parts that were uploaded.
    """

    environment: dict[str, str] = field(default_factory=dict)
    objects: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    parts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    generation: int = 1000

    def put(self, path: str, data: bytes, expected: str | None) -> int | None:
        """Write an object; None where its generation is not the expected one, 0 for no object."""
        with self.lock:
            if expected is not None and int(expected) != self.objects.get(path, (0, b""))[0]:
                return None
            self.generation += 1
            self.objects[path] = (self.generation, data)
            return self.generation


@contextmanager
def google_store() -> Iterator[GoogleStore]:
    """Run the server."""
    store = GoogleStore()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def _answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: Any) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def _request(self) -> tuple[str, dict[str, list[str]], bytes]:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return unquote(url.path).strip("/"), parse_qs(url.query, keep_blank_values=True), body

        def do_GET(self) -> None:
            path, query, _ = self._request()
            if "/" not in path:
                start = f"{path}/{query.get('prefix', [''])[0]}"
                rows = "".join(
                    f"<Contents><Key>{escape(name.removeprefix(f'{path}/'))}</Key><Size>{len(data)}</Size>"
                    f"<ETag>{escape(_etag(data))}</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    for name, (_, data) in sorted(store.objects.items())
                    if name.startswith(start)
                )
                listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
                self._answer(200, listing.encode())
                return
            generation, data = store.objects.get(path, (0, b""))
            headers: dict[str, Any] = {
                "ETag": _etag(data),
                "x_goog_generation": str(generation),
                "Last_Modified": _DATE,
            }
            if generation == 0:
                self._answer(404)
            elif self.headers.get("If-Match", _etag(data)) != _etag(data):
                self._answer(412)
            elif self.command == "HEAD":
                self._answer(200, length=len(data), **headers)
            elif "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1]
                span = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                self._answer(206, part, Content_Range=span, **headers)
            else:
                self._answer(200, data, **headers)

        do_HEAD = do_GET  # noqa: N815

        def do_PUT(self) -> None:
            path, query, body = self._request()
            if "uploadId" in query:
                store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
                store.parts += 1
                self._answer(200, ETag=_etag(body))
                return
            self._created(path, body)

        def do_POST(self) -> None:
            path, query, _ = self._request()
            if "uploads" in query:
                upload = f"upload-{len(store.uploads)}"
                store.uploads[upload] = {}
                ids = f"<Bucket>b</Bucket><Key>{escape(path)}</Key><UploadId>{upload}</UploadId>"
                self._answer(200, f"<InitiateMultipartUploadResult>{ids}</InitiateMultipartUploadResult>".encode())
                return
            parts = store.uploads[query["uploadId"][0]]
            data = b"".join(parts[number] for number in sorted(parts))
            parts.clear()
            done = f"<Key>{escape(path)}</Key><ETag>{escape(_etag(data))}</ETag>"
            result = f"<CompleteMultipartUploadResult>{done}</CompleteMultipartUploadResult>"
            self._created(path, data, result.encode())

        def do_DELETE(self) -> None:
            path, query, _ = self._request()
            if "uploadId" in query:
                store.uploads[query["uploadId"][0]].clear()
                self._answer(204)
            else:
                self._answer(404 if store.objects.pop(path, None) is None else 204)

        def _created(self, path: str, data: bytes, body: bytes = b"") -> None:
            generation = store.put(path, data, self.headers.get("x-goog-if-generation-match"))
            if generation is None:
                self._answer(412)
            else:
                self._answer(200, body, ETag=_etag(data), x_goog_generation=str(generation))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    store.environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "GOOGLE_ALLOW_HTTP": "true"}
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
