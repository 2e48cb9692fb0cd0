"""A server on loopback that speaks as much of the Hub's HTTP API as reading and publishing models takes.

Large files (LFS) are answered with a redirect to a store on a port of its own, under an address that is signed and
expires, as the Hub does. What goes wrong on real networks can be made to go wrong here; see :class:`Faults`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 20_000
"""Files of this size and more are in the store; the others are git blobs."""


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        token: the only token that is let in; None lets everybody in.
        gated: say that the repo is gated, to those who have another token or none.
        too_many: how many requests are answered with 429 before any other answer.
        server_errors: how many requests to the store are answered with 503.
        break_after: transfers are cut after that many bytes, ``breaks`` times.
        stuck: cut transfers give no byte at all.
        lie: how the store treats a range: ``shifted`` and ``size`` state a wrong Content-Range, ``ignored`` sends the
            whole file, ``silent`` states none.
        expire_after: an address that was signed serves that many requests.
        etag_of_store: changes the ETag of the store after that many requests.
        delay: seconds before each answer.
        change_etag_after: the Hub gives files another ETag after that many HEADs.
    """

    token: str | None = None
    gated: bool = False
    too_many: int = 0
    server_errors: int = 0
    break_after: int = 0
    breaks: int = 0
    stuck: bool = False
    lie: str = ""
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
    def etag(self) -> str:
        blob = b"blob %d\0" % len(self.data) + self.data
        return self.sha256 if self.lfs else hashlib.sha1(blob).hexdigest()


@dataclass
class Hub:
    """Repos: name -> commit -> file -> contents, and which commit a revision is."""

    commits: dict[str, dict[str, dict[str, Stored]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of every request to the Hub and the store."""
    sent: int = 0
    """Bytes of all bodies."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Uploaded LFS objects."""
    url: str = ""
    store_url: str = ""
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

    def commit(self, repo: str, files: dict[str, Stored], revision: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted((name, file.etag) for name, file in files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[revision] = commit
        return commit

    def files(self, repo: str, revision: str = "main") -> dict[str, Stored]:
        return self.commits[repo][self.refs[repo].get(revision, revision)]

    def settle(self) -> None:
        """Wait until nobody asks for anything any more."""
        count = -1
        while count != len(self.requests):
            count = len(self.requests)
            time.sleep(0.2)

    def ranges(self) -> list[str]:
        """The ranges that were asked for."""
        return [stated for method, _, stated in self.requests if method == "GET" and stated]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

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
        time.sleep(self.hub.faults.delay)


class HubHandler(Handler):
    """The Hub itself."""

    def do_GET(self) -> None:
        self._dispatch()

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _dispatch(self, body: bytes = b"") -> None:
        self._note()
        hub, faults = self.hub, self.hub.faults
        with hub.lock:
            faults.too_many -= 1
        if faults.too_many >= 0:
            self._answer(429, b"", {"Retry-After": "0"})
            return
        path = unquote(urlsplit(self.path).path)
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if faults.token is not None and given != faults.token:
            if faults.gated:
                self._refused(403 if given else 401, "GatedRepo", "Access to this model is restricted")
            else:
                self._refused(401, "RepoNotFound", "Repository Not Found")
            return
        if self.command == "POST":
            self._write(path, body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._refused(404, "EntryNotFound", f"no such address: {path}")

    def _commit_of(self, repo: str, revision: str) -> str | None:
        if repo not in self.hub.commits:
            self._refused(404, "RepoNotFound", "Repository Not Found")
            return None
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            self._refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit

    def _info(self, repo: str, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        if commit is None:
            return
        siblings: list[dict[str, Any]] = []
        for name, file in self.hub.commits[repo][commit].items():
            sibling: dict[str, Any] = {"rfilename": name}
            if "blobs" in parse_qs(urlsplit(self.path).query):
                sibling |= {"size": len(file.data), "blobId": file.etag}
                if file.lfs:
                    sibling["lfs"] = {"size": len(file.data), "sha256": file.sha256, "pointerSize": 134}
            siblings.append(sibling)
        self._json({"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        if commit is None:
            return
        self._json([
            {"type": "file", "path": name, "size": len(file.data), "oid": file.etag}
            | ({"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.lfs else {})
            for name, file in self.hub.commits[repo][commit].items()
        ])  # fmt: skip

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit_of(repo, revision)
        if commit is None:
            return
        file = self.hub.commits[repo][commit].get(name)
        if file is None:
            self._refused(404, "EntryNotFound", "Entry not found")
            return
        hub = self.hub
        etag = file.etag
        if self.command == "HEAD":
            with hub.lock:
                hub.heads += 1
            if hub.faults.change_etag_after and hub.heads > hub.faults.change_etag_after:
                etag = etag[::-1]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not file.lfs:
            _send_range(self, file.data, {**headers, "ETag": f'"{etag}"'})
            return
        with hub.lock:
            hub.signatures += 1
            signature = str(hub.signatures)
        location = f"{hub.store_url}/{file.sha256}?signature={signature}"
        linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(file.data)), "Location": location}
        self._answer(302, b"", headers | linked)

    def _write(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            hub.commits.setdefault(repo, {"0" * 40: {}})
            hub.refs.setdefault(repo, {"main": "0" * 40})
            self._json({"url": f"{hub.url}/{repo}", "name": repo, "id": "1"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
                 "shouldIgnore": False, "oid": None}
                for file in files
            ]  # fmt: skip
            self._json({"files": modes})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {"oid": item["oid"], "size": item["size"],
                 "actions": {"upload": {"href": f"{hub.store_url}/upload/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]  # fmt: skip
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = dict(hub.files(match[1]))
            for line in body.decode().splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"]))
                elif item["key"] == "lfsFile":
                    files[value["path"]] = Stored(hub.objects[value["oid"]])
            commit = hub.commit(match[1], files)
            self._json({"commitUrl": f"{hub.url}/{match[1]}/commit/{commit}", "commitOid": commit, "success": True})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._refused(404, "EntryNotFound", f"no such address: {path}")


class StoreHandler(Handler):
    """The store of large files, which knows nothing of tokens."""

    def do_GET(self) -> None:
        self._note()
        hub, faults = self.hub, self.hub.faults
        with hub.lock:
            hub.busy += 1
            hub.busiest = max(hub.busiest, hub.busy)
            hub.store_requests += 1
            count = hub.store_requests
            faults.server_errors -= 1
        try:
            address = urlsplit(self.path)
            signature = parse_qs(address.query).get("signature", [""])[0]
            hub.signed[signature] += 1
            file = next(
                (
                    file
                    for commits in hub.commits.values()
                    for files in commits.values()
                    for file in files.values()
                    if file.lfs and f"/{file.sha256}" == address.path
                ),
                None,
            )
            assert self.headers.get("Authorization") is None, "a token left the Hub"
            if faults.server_errors >= 0:
                self._answer(503)
            elif faults.expire_after and hub.signed[signature] > faults.expire_after:
                self._answer(403, b"<Error>Request has expired</Error>")
            elif file is None:
                self._answer(404)
            else:
                changed = faults.etag_of_store and count > faults.etag_of_store
                _send_range(self, file.data, {"ETag": '"other"' if changed else f'"{file.sha256[:32]}"'}, faults)
        finally:
            with hub.lock:
                hub.busy -= 1

    def do_PUT(self) -> None:
        self._note()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self._answer(200, b"", {"ETag": '"uploaded"'})


def _send_range(handler: Handler, data: bytes, headers: dict[str, str], faults: Faults | None = None) -> None:
    faults = faults or Faults()
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if match is None or faults.lie == "ignored":
        handler._answer(200, data, headers)
        return
    start, end = int(match[1]), min(int(match[2]) + 1, len(data))
    body = data[start:end]
    stated = f"bytes {start}-{end - 1}/{len(data)}"
    if faults.lie == "shifted":
        stated = f"bytes {start + 1}-{end}/{len(data)}"
        body = data[start + 1 : end + 1]
    elif faults.lie == "size":
        stated = f"bytes {start}-{end - 1}/{len(data) + 1}"
    headers = headers if faults.lie == "silent" else {**headers, "Content-Range": stated}
    with handler.hub.lock:
        broken = faults.break_after and len(body) > faults.break_after and faults.breaks > 0
        faults.breaks -= bool(broken)
    if broken:
        handler._answer(
            206, b"" if faults.stuck else body[: faults.break_after], {**headers, "Content-Length": str(len(body))}
        )
        handler.close_connection = True
        return
    handler._answer(206, body, headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None: ...  # clients that go away


def start_hub() -> tuple[Hub, list[ThreadingHTTPServer]]:
    """Start the Hub and its store, each on a port of its own; the servers are to be shut down."""
    hub = Hub()
    servers = []
    for base in (HubHandler, StoreHandler):
        handler = type(base.__name__, (base,), {"hub": hub})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
    hub.url, hub.store_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    return hub, servers  # type: ignore[return-value]
