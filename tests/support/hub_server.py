"""A server on loopback that speaks as much of the Hub's HTTP API as reading and publishing models takes.

Large files (LFS) are answered with a redirect to a store on a port of its own, under an address that is signed and
expires, as the Hub does. Faults of real networks can be injected; see :class:`hub_state.Faults`.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import threading
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_state import LFS_BYTES, Handler, Hub, Stored
from support.hub_store import StoreHandler, read_token, send_range, signed, xet_headers


class HubHandler(Handler):
    """The Hub itself."""

    def do_GET(self) -> None:  # noqa: N802
        self._dispatch()

    def do_HEAD(self) -> None:  # noqa: N802
        self._dispatch()

    def do_POST(self) -> None:  # noqa: N802
        self._dispatch(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _dispatch(self, body: bytes = b"") -> None:
        self._note()
        hub, faults = self.hub, self.hub.faults
        with hub.lock:
            hanging_up, busy = faults.hang_up > 0, faults.too_many > 0
            faults.too_many -= 1
            faults.hang_up -= 1
        if hanging_up:
            self.close_connection = True
            return
        if busy:
            self._answer(429, b"", {"Retry-After": faults.retry_after})
            return
        if faults.answer is not None:
            self._answer(200, faults.answer, {"Content-Type": "text/html"})
            return
        path = unquote(urlsplit(self.path).path)
        if not path.startswith(f"{hub.prefix}/"):
            self._answer(404)
            return
        path = path.removeprefix(hub.prefix)
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if faults.token is not None and bearer != faults.token:
            if faults.gated:
                self._refused(403 if bearer else 401, "GatedRepo", "Access to this model is restricted")
            else:
                self._refused(401, "RepoNotFound", "Repository Not Found")
            return
        if self.command == "POST":
            self._write(path, body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/api/buckets/([^/]+/[^/]+)/tree(?:/(.+))?", path):
            self._bucket_tree(match[1], match[2] or "")
        elif match := re.fullmatch(r"/buckets/([^/]+/[^/]+)/resolve/(.+)", path):
            self._bucket_file(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-read-token/([^/]+)", path):
            read_token(self)
        elif hub.resolve_cache and (match := re.fullmatch(r"/api/resolve-cache/(.+)/([^/]+)/([^/]+)", path)):
            self._resolve(match[1], match[2], match[3])
        elif faults.circle:
            self._answer(302, b"", {"Location": self.path})
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
            | ({"xetHash": file.xet_hash} if file.lfs and self.hub.xet else {})
            for name, file in self.hub.commits[repo][commit].items()
        ])  # fmt: skip

    def _bucket_tree(self, bucket: str, prefix: str) -> None:
        """The files whose paths begin with a prefix, in pages of two."""
        if bucket not in self.hub.buckets:
            self._refused(404, "RepoNotFound", "Repository Not Found")
            return
        rows = [
            {"type": "file", "path": name, "size": len(file.data), "xetHash": file.xet_hash, "mtime": None}
            for name, file in sorted(self.hub.buckets[bucket].items())
            if name.startswith(prefix)
        ]
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        following = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={first + 2}"
        more = {"Link": f'<{following}>; rel="next"'} if first + 2 < len(rows) else {}
        body = json.dumps(rows[first : first + 2]).encode()
        self._answer(200, body, {"Content-Type": "application/json", **more})

    def _bucket_file(self, bucket: str, name: str) -> None:
        """Every file of a bucket is in Xet storage: a redirect to a signed address."""
        file = self.hub.buckets.get(bucket, {}).get(name)
        if file is None:
            self._refused(404, "EntryNotFound", "Entry not found")
            return
        route = f"{self.hub.url}/api/buckets/{bucket}/xet-read-token"
        headers = {"X-Linked-Size": str(len(file.data)), "Location": signed(self.hub, file)}
        if self.hub.states_xet_hash:
            headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
        self._answer(302, b"", headers)

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
        if not file.lfs and hub.resolve_cache and "resolve-cache" not in self.path:
            self._answer(307, b"", {**headers, "Location": f"{hub.prefix}/api/resolve-cache/{repo}/{commit}/{name}"})
            return
        if not file.lfs:
            send_range(self, file.data, {**headers, "ETag": f'"{etag}"'})
            return
        linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(file.data)), "Location": signed(hub, file)}
        self._answer(302, b"", headers | linked | (xet_headers(hub, repo, commit, file) if hub.xet else {}))

    def _write(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            request_json = json.loads(body)
            repo = f"{request_json.get('organization') or 'user'}/{request_json['name']}"
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None: ...  # clients that go away


class _Server6(_Server):
    address_family = socket.AF_INET6


def start_hub(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> tuple[Hub, list[ThreadingHTTPServer]]:
    """Start the Hub and its store, each on a port of its own; the servers are to be shut down."""
    hub = Hub()
    servers: list[ThreadingHTTPServer] = []
    for base in (HubHandler, StoreHandler):
        handler = type(base.__name__, (base,), {"hub": hub})
        server = (_Server6 if ":" in host else _Server)((host, 0), handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
    # Another name for the store: huggingface_hub may take a server of the same name for the Hub, whatever its port.
    names = (f"[{host}]", f"[{host}]") if ":" in host else (host, "localhost")
    hub.url, hub.store_url = (
        f"{'http' if tls is None else 'https'}://{name}:{server.server_address[1]}"
        for name, server in zip(names, servers, strict=True)
    )
    return hub, servers
