"""The store of large files, to which the Hub on loopback redirects; and what makes it Xet storage.

With Xet the response to a resolve request also holds the file's name in Xet storage and the URL of a token. A client
that follows the redirect gets plain ranges, under an ETag that is that name; hf_xet requests the token, then a
reconstruction of the file from the store, then chunks.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from urllib.parse import parse_qs, urlsplit

from support.hub_state import Faults, Handler, Hub, Stored

_CHUNK = 65_536


class StoreHandler(Handler):
    """The store of large files, which knows nothing of tokens."""

    def do_GET(self) -> None:  # noqa: N802
        self._note()
        hub, faults = self.hub, self.hub.faults
        address = urlsplit(self.path)
        if address.path.startswith(("/v1/", "/v2/", "/xorbs/")):
            _from_xet(self, address.path)
            return
        with hub.lock:
            hub.busy += 1
            hub.busiest = max(hub.busiest, hub.busy)
            hub.store_requests += 1
            count = hub.store_requests
            failing, refusing = faults.server_errors > 0, faults.refusals > 0
            faults.server_errors -= 1
            faults.refusals -= 1
        try:
            signature = parse_qs(address.query).get("Signature", [""])[0]
            hub.signed[signature] += 1
            file = _file(hub, address.path.rpartition("/")[2])
            assert self.headers.get("Authorization") is None, "a token left the Hub"
            if failing:
                self._answer(503)
            elif refusing or (faults.expire_after and hub.signed[signature] > faults.expire_after):
                self._answer(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})
            elif file is None:
                self._answer(404)
            else:
                etag = file.xet_hash if hub.xet else file.sha256[:32]
                if self.headers["Host"] in hub.other_store_url:
                    etag = f"{etag}-2"
                changed = faults.etag_of_store and count > faults.etag_of_store
                send_range(self, file.data, {"ETag": '"other"' if changed else f'"{etag}"'}, faults)
        finally:
            with hub.lock:
                hub.busy -= 1

    def do_POST(self) -> None:  # noqa: N802
        """The reports of hf_xet on its downloads."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(200)

    def do_PUT(self) -> None:  # noqa: N802
        self._note()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self._answer(200, b"", {"ETag": '"uploaded"'})


def signed(hub: Hub, file: Stored) -> str:
    """An address of a file at the store that is good for a while."""
    with hub.lock:
        hub.signatures += 1
        number = hub.signatures
    store = hub.other_store_url if hub.other_store_url and number % 2 else hub.store_url
    if not hub.xet:
        return f"{store}/{file.sha256}?Signature={number}"
    about = "X-Xet-Cas-Uid=public&response-content-disposition=inline%3B+filename%3D%22model.safetensors%22%3B"
    sign = f"Expires={int(time.time()) + 3600}&Policy=eyJ9&Signature={number}&Key-Pair-Id=K"
    return f"{store}/xet-bridge-us/66c79157c1b3c03c617c55cc/{file.xet_hash}?{about}&{sign}"


def xet_headers(hub: Hub, repo: str, commit: str, file: Stored) -> dict[str, str]:
    """What the Hub adds to the answer for a file in Xet storage."""
    route = f"{hub.url}/api/models/{repo}/xet-read-token/{commit}"
    reconstruction = f"{hub.store_url}/v1/reconstructions/{file.xet_hash}"
    return {
        "X-Xet-Hash": file.xet_hash,
        "X-Xet-Refresh-Route": route,
        "Link": f'<{route}>; rel="xet-auth", <{reconstruction}>; rel="xet-reconstruction-info"',
    }


def read_token(handler: Handler) -> None:
    """Send the URL of Xet storage and a token that expires."""
    url, expires = handler.hub.xet_url or handler.hub.store_url, int(time.time()) + 3600
    token_headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    handler._answer(200, json.dumps({"casUrl": url, "accessToken": "xet", "exp": expires}).encode(), token_headers)


def _from_xet(handler: Handler, path: str) -> None:
    """Answer hf_xet: how a file is put together, or the chunks of which it is."""
    hub, name = handler.hub, path.rpartition("/")[2]
    file = _file(hub, name)
    if file is None or path.startswith("/v2/"):  # the older way of asking is enough here
        handler._answer(404)
        return
    chunks = [file.data[start : start + _CHUNK] for start in range(0, len(file.data), _CHUNK)]
    lengths = [len(chunk).to_bytes(3, "little") for chunk in chunks]
    xorb = b"".join(b"\0" + size + b"\0" + size + chunk for size, chunk in zip(lengths, chunks, strict=True))
    if path.startswith("/xorbs/"):
        send_range(handler, xorb, {})
        return
    assert handler.headers["Authorization"] == "Bearer xet", "hf_xet came without its token"
    whole = {"start": 0, "end": len(chunks)}
    fetch = {"range": whole, "url": f"{hub.store_url}/xorbs/{name}", "url_range": {"start": 0, "end": len(xorb) - 1}}
    handler._json({
        "offset_into_first_range": 0, "fetch_info": {name: [fetch]},
        "terms": [{"hash": name, "unpacked_length": len(file.data), "range": whole}],
    })  # fmt: skip


def _file(hub: Hub, name: str) -> Stored | None:
    """The file that the store knows by one of its hashes."""
    every = (file for commits in hub.commits.values() for files in commits.values() for file in files.values())
    stored = [file for file in every if file.lfs] + [file for files in hub.buckets.values() for file in files.values()]
    return next((file for file in stored if name == (file.xet_hash if hub.xet else file.sha256)), None)


def send_range(handler: Handler, data: bytes, headers: dict[str, str], faults: Faults | None = None) -> None:
    """Send the requested range, or what the faults turn it into."""
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
    elif faults.lie == "416":
        handler._answer(416, b"", {"Content-Range": f"bytes */{start}"})
        return
    elif faults.lie == "circle":
        handler._answer(302, b"", {"Location": handler.path})
        return
    headers = headers if faults.lie == "silent" else {**headers, "Content-Range": stated}
    if faults.lie == "gzip":
        body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
    elif faults.lie == "empty":
        body = b""
    with handler.hub.lock:
        broken = faults.break_after and len(body) > faults.break_after and faults.breaks > 0
        faults.breaks -= bool(broken)
    if faults.chunked or faults.lie == "endless":
        sent = body[: faults.break_after] if broken else body
        _send_chunks(handler, sent, headers, broken=bool(broken), endless=faults.lie == "endless")
    elif broken:
        sent = b"" if faults.stuck else body[: faults.break_after]
        handler._answer(206, sent, {**headers, "Content-Length": str(len(body))})
        handler.close_connection = True
    else:
        handler._answer(206, body, headers)


def _send_chunks(handler: Handler, body: bytes, headers: dict[str, str], *, broken: bool, endless: bool) -> None:
    """A body without a Content-Length, in chunks."""
    handler.send_response(206)
    for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
        handler.send_header(name, value)
    handler.end_headers()
    while True:
        for start in range(0, len(body), 1000):
            part = body[start : start + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            handler.hub.sent += len(part)
        if not endless:
            break
    if broken:
        handler.close_connection = True
    else:
        handler.wfile.write(b"0\r\n\r\n")
