"""An object store on loopback that gives each client a fixed bandwidth in each direction, for benchmarks/scale.py.

It has the part of S3 that obstore and boto3 use here, and keeps objects in memory, equal ones once. A client is an
access key.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import xxhash

BLOCK: Final = 2**18
QUEUE_SECONDS: Final = 0.05
"""What a link sends while a thread of the store that feeds it wakes up: links have queues."""
_DATE: Final = "Thu, 01 Jan 2026 00:00:00 GMT"


class Link:
    """A client's bandwidth in one direction. Bytes leave no sooner than it allows.

    Attributes:
        sent: the times at which bytes left, and how many.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()
        self.sent: list[tuple[float, int]] = []

    def send(self, nbytes: int) -> None:
        """Wait until the link has sent some bytes."""
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now - QUEUE_SECONDS) + nbytes / self._rate
            self.sent.append((self._free, nbytes))
            wait = self._free - now
        if wait > 0:
            time.sleep(wait)


class Stored(NamedTuple):
    """An object, and its ETag."""

    data: bytes
    etag: str


class Store:
    """The objects and the links. A context manager that serves them.

    Args:
        rates: beginnings of clients' names -> their bytes per second in each direction; others have no limit.

    Attributes:
        written: when each object was last written.
    """

    def __init__(self, rates: Mapping[str, float]) -> None:
        self._rates = rates
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests = 0
        self.written: dict[str, float] = {}
        self._contents: dict[bytes, bytes] = {}
        self._first: dict[str, dict[str, bytes]] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Store:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def put(self, name: str, data: bytes) -> str:
        """Write an object, and return its ETag."""
        data = self._contents.setdefault(xxhash.xxh3_128_digest(data), data)
        stored = Stored(data, f'"{os.urandom(16).hex()}"')
        self.objects[name] = stored
        self.written[name] = time.monotonic()
        return stored.etag

    def link(self, client: str, direction: str) -> Link:
        """The link of a client, ``in`` to the store or ``out`` of it."""
        with self._lock:
            self.requests += 1
            found = self._links.get((client, direction))
            if found is None:
                rate = next((rate for start, rate in self._rates.items() if client.startswith(start)), 1e12)
                found = self._links[client, direction] = Link(rate)
            return found

    def sent(self, clients: Iterable[str], direction: str, since: float = 0) -> list[tuple[float, int]]:
        """When some clients sent or received bytes, and how many, in the order of time."""
        links = (self._links.get((client, direction)) for client in clients)
        return sorted(item for link in links if link is not None for item in link.sent if item[0] >= since)

    def below(self, prefix: str) -> dict[str, Stored]:
        """The objects below a prefix by their names without it."""
        return {name.removeprefix(prefix): item for name, item in self.objects.items() if name.startswith(prefix)}

    def compare_and_delete(self, prefix: str, model: str) -> None:
        """Compare the objects below a prefix with the first that the model was converted to, and delete them."""
        found = {name: item.data for name, item in self.below(prefix).items()}
        if found != self._first.setdefault(model, found):
            raise SystemExit(f"the objects below {prefix} differ from those of the first run")
        for name in found:
            del self.objects[prefix + name]

    def shards(self, model: str) -> list[int]:
        """The sizes of the shards that a model was converted to."""
        first = self._first.get(model, {})
        return sorted(len(data) for name, data in first.items() if name.endswith(".safetensors"))


def busy(sent: Iterable[tuple[float, int]], started: float, rate: float) -> list[float]:
    """The share of its bandwidth that a client used in each second since ``started``."""
    seconds: defaultdict[int, int] = defaultdict(int)
    for moment, nbytes in sent:
        seconds[int(moment - started)] += nbytes
    return [seconds[second] / rate for second in range(max(seconds, default=-1) + 1)]


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None: ...

        def _link(self, direction: str) -> Link:
            match = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
            return store.link(match[1] if match else "", direction)

        def _body(self) -> bytes:
            link, data, done = self._link("in"), bytearray(int(self.headers.get("Content-Length") or 0)), 0
            view = memoryview(data)
            while done < len(data):
                count = self.rfile.readinto(view[done : done + BLOCK])  # type: ignore[attr-defined]
                if not count:
                    break
                link.send(count)
                done += count
            return bytes(view[:done])

        def _send(self, status: int, body: bytes | memoryview = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            link = self._link("out")
            for start in range(0, len(body), BLOCK):
                link.send(len(body[start : start + BLOCK]))
                self.wfile.write(body[start : start + BLOCK])

        def _xml(self, kind: str, rows: str) -> None:
            self._send(200, f"<{kind}>{rows}</{kind}>".encode())

        def _target(self) -> tuple[str, dict[str, list[str]]]:
            url = urlsplit(self.path)
            return unquote(url.path).lstrip("/").partition("/")[2], parse_qs(url.query, keep_blank_values=True)

        def do_GET(self) -> None:
            name, query = self._target()
            if not name:
                self._list(query)
                return
            item = store.objects.get(name)
            if item is None:
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
                return
            if "Range" not in self.headers:
                self._send(200, memoryview(item.data), ETag=item.etag, Last_Modified=_DATE)
                return
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = memoryview(item.data)[int(first) : int(last) + 1]
            span = f"bytes {first}-{int(first) + len(part) - 1}/{len(item.data)}"
            self._send(206, part, Content_Range=span, ETag=item.etag, Last_Modified=_DATE)

        def _list(self, query: dict[str, list[str]]) -> None:
            if "uploads" in query:
                self._xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>")
                return
            prefix = query.get("prefix", [""])[0]
            rows = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(item.data)}</Size><ETag>{escape(item.etag)}</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key, item in sorted(store.objects.items())
                if key.startswith(prefix)
            )
            self._xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{rows}")

        def do_HEAD(self) -> None:
            item = store.objects.get(self._target()[0])
            if item is None:
                self._send(404)
            else:
                self._send(200, length=len(item.data), ETag=item.etag, Last_Modified=_DATE)

        def do_PUT(self) -> None:
            name, query = self._target()
            data = self._body()
            found = store.objects.get(name)
            if "uploadId" in query:
                store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = data
                self._send(200, ETag=f'"{os.urandom(16).hex()}"')
            elif ("If-None-Match" in self.headers and found) or (
                "If-Match" in self.headers and (found is None or found.etag != self.headers["If-Match"])
            ):
                self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                self._send(200, ETag=store.put(name, data))

        def do_POST(self) -> None:
            name, query = self._target()
            body = self._body()
            if "uploads" in query:
                upload = os.urandom(8).hex()
                store.uploads[upload] = {}
                ids = f"<Bucket>b</Bucket><Key>{escape(name)}</Key><UploadId>{upload}</UploadId>"
                self._xml("InitiateMultipartUploadResult", ids)
            elif "uploadId" in query:
                parts = store.uploads.pop(query["uploadId"][0])
                etag = store.put(name, b"".join(parts[number] for number in sorted(parts)))
                self._xml("CompleteMultipartUploadResult", f"<Key>{escape(name)}</Key><ETag>{escape(etag)}</ETag>")
            else:  # several objects are deleted
                keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
                for key in keys:
                    store.objects.pop(unescape(key), None)
                self._xml("DeleteResult", "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys))

        def do_DELETE(self) -> None:
            name, query = self._target()
            store.uploads.pop(query.get("uploadId", [""])[0], None)
            store.objects.pop(name, None)
            self._send(204)

    return Handler
