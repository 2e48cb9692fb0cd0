"""State and faults of the Hub on loopback, and the base of its request handlers."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from support.loopback import Loopback

LFS_BYTES = 20_000
"""Files of this size and more are in the store; the others are git blobs."""


@dataclass
class Faults:
    """Faults to inject.

    Attributes:
        token: the only token that is accepted; None accepts every request.
        gated: respond to other tokens, or to none, that the repo is gated.
        too_many: how many requests are answered with 429 before any other answer.
        retry_after: seconds to wait in those responses.
        server_errors: how many requests to the store are answered with 503.
        refusals: how many requests to the store are answered with 403, however new their address is.
        hang_up: how many requests to the Hub get no answer at all.
        break_after: transfers are cut after that many bytes, ``breaks`` times.
        stuck: cut transfers give no byte at all.
        lie: how the store responds to a range: ``shifted`` and ``size`` state a wrong Content-Range, ``ignored`` sends
            the whole file, ``silent`` states no Content-Range, ``gzip`` compresses, ``416`` refuses it, ``empty``
            sends no bytes, ``endless`` repeats the bytes forever, ``circle`` redirects to the same address.
        chunked: answers of the store do not say how long they are.
        circle: the Hub redirects a request for a file to the same address.
        answer: the Hub's response to every request, instead of the right one.
        expire_after: an address that was signed serves that many requests.
        etag_of_store: changes the ETag of the store after that many requests.
        delay: seconds before each answer.
        change_etag_after: the Hub gives files another ETag after that many HEADs.
    """

    token: str | None = None
    gated: bool = False
    too_many: int = 0
    retry_after: str = "0"
    server_errors: int = 0
    refusals: int = 0
    hang_up: int = 0
    break_after: int = 0
    breaks: int = 0
    stuck: bool = False
    lie: str = ""
    chunked: bool = False
    circle: bool = False
    answer: bytes | None = None
    expire_after: int = 0
    etag_of_store: int = 0
    delay: float = 0.0
    change_etag_after: int = 0


@dataclass
class Stored:
    """A file of a commit."""

    data: bytes

    @property
    def lfs(self) -> bool:
        return len(self.data) >= LFS_BYTES

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def xet_hash(self) -> str:
        """The name in Xet storage, another one than the SHA-256."""
        return hashlib.sha256(b"xet" + self.data).hexdigest()

    @property
    def etag(self) -> str:
        blob = b"blob %d\0" % len(self.data) + self.data
        return self.sha256 if self.lfs else hashlib.sha1(blob).hexdigest()


@dataclass
class Hub:
    """Repos: name -> commit -> file -> contents, and which commit a revision is."""

    commits: dict[str, dict[str, dict[str, Stored]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    buckets: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """Bucket -> path -> contents."""
    states_xet_hash: bool = True
    """Responses for files of buckets hold their hashes."""
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of every request to the Hub and the store."""
    peers: set[int] = field(default_factory=set)
    """The ports that requests came from."""
    xet: bool = False
    """Large files are in Xet storage."""
    xet_url: str = ""
    """Where Xet storage is; by default the store."""
    resolve_cache: bool = False
    """Small files are found at another address of the Hub, to which it redirects."""
    prefix: str = ""
    """The path under which the Hub is found, where it is not alone on its server."""
    sent: int = 0
    """Bytes of all bodies."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Uploaded LFS objects."""
    url: str = ""
    store_url: str = ""
    other_store_url: str = ""
    """Another name of the store; where there is one, the Hub sends to both in turn, and each has ETags of its own."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    signed: Counter[str] = field(default_factory=Counter)
    signatures: int = 0
    heads: int = 0
    store_requests: int = 0
    busy: int = 0
    busiest: int = 0

    def publish(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Put a folder into a repo; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): Stored(path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.commit(repo, files, revision)

    def fill_bucket(self, bucket: str, folder: Path, prefix: str = "") -> None:
        """Put the files of a folder into a bucket."""
        self.buckets.setdefault(bucket, {}).update(
            (prefix + path.relative_to(folder).as_posix(), Stored(path.read_bytes()))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        )

    def commit(self, repo: str, files: dict[str, Stored], revision: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted((name, file.etag) for name, file in files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[revision] = commit
        return commit

    def files(self, repo: str, revision: str = "main") -> dict[str, Stored]:
        return self.commits[repo][self.refs[repo].get(revision, revision)]

    def settle(self) -> None:
        """Wait until requests stop."""
        count = -1
        while count != len(self.requests):
            count = len(self.requests)
            time.sleep(0.2)

    def ranges(self) -> list[str]:
        """The ranges requested."""
        return [stated for method, _, stated in self.requests if method == "GET" and stated]


class Handler(Loopback, BaseHTTPRequestHandler):
    hub: Hub

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent += len(body)
            self.wfile.write(body)

    def _refused(self, status: int, code: str, message: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _note(self) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
            self.hub.peers.add(self.client_address[1])
        time.sleep(self.hub.faults.delay)
