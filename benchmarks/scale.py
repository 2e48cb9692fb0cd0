"""How a conversion scales over several workers, where the network of each worker is the limit.

    python benchmarks/scale.py [--workers 1 2 4 8] [--rate 4] [--experts 16] [--shards 32] [--ray]

A store on loopback gives each client (each access key) a fixed bandwidth in each direction. Workers convert from it to
it with ``--part k/N``, each in a process of its own; with ``--ray``, as nodes of one CPU of a Ray cluster. Reported:
seconds without the start of the interpreters, which share the processor of one machine here; the rate over all workers;
the share of the bandwidth that a worker fills; and the most memory that a worker of ``--part`` used. A machine with few
cores limits how much bandwidth can be simulated: choose a rate at which its processor is not busy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

MB = 10**6
BLOCK = 2**16


class Bandwidth:
    """A client's bandwidth in one direction: bytes leave no sooner than it allows."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def use(self, nbytes: int) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic()) + nbytes / self._rate
            wait = self._free - time.monotonic()
        time.sleep(max(wait, 0))


class Store:
    """Objects in memory, with the part of S3 that obstore and boto3 use here."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests = 0
        self._clients: dict[tuple[str, str], Bandwidth] = {}
        self._lock = threading.Lock()

    def bandwidth(self, client: str, direction: str) -> Bandwidth:
        with self._lock:
            self.requests += 1
            return self._clients.setdefault((client, direction), Bandwidth(self.rate if client != "free" else 1e12))


_tags: dict[int, tuple[bytes, str]] = {}


def digest(data: bytes) -> str:
    """The ETag of data."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def etag(data: bytes) -> str:
    """The ETag of an object, computed once."""
    known = _tags.get(id(data))
    if known is None or known[0] is not data:
        _tags[id(data)] = known = (data, digest(data))
    return known[1]


def handler_of(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def _client(self, direction: str) -> Bandwidth:
            match = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
            return store.bandwidth(match[1] if match else "free", direction)

        def _body(self) -> bytes:
            bandwidth, left, blocks = self._client("in"), int(self.headers.get("Content-Length") or 0), []
            while left:
                block = self.rfile.read(min(BLOCK, left))
                bandwidth.use(len(block))
                blocks.append(block)
                left -= len(block)
            return b"".join(blocks)

        def _send(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            bandwidth = self._client("out")
            for start in range(0, len(body), BLOCK):
                bandwidth.use(len(body[start : start + BLOCK]))
                self.wfile.write(body[start : start + BLOCK])

        def _target(self) -> tuple[str, dict[str, list[str]]]:
            url = urlsplit(self.path)
            return unquote(url.path).lstrip("/").partition("/")[2], parse_qs(url.query, keep_blank_values=True)

        def do_GET(self) -> None:
            name, query = self._target()
            if not name:
                prefix = query.get("prefix", [""])[0]
                found = [item for item in sorted(store.objects.items()) if item[0].startswith(prefix)]
                rows = "".join(
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(etag(data))}</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    for key, data in found
                )
                kind = "ListMultipartUploadsResult" if "uploads" in query else "ListBucketResult"
                rows = "" if "uploads" in query else rows
                self._send(200, f"<{kind}><IsTruncated>false</IsTruncated>{rows}</{kind}>".encode())
                return
            data = store.objects.get(name)
            if data is None:
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
                return
            headers = {"ETag": etag(data), "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
            if "Range" not in self.headers:
                self._send(200, data, **headers)
                return
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1]
            self._send(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}", **headers)

        def do_HEAD(self) -> None:
            data = store.objects.get(self._target()[0])
            self._send(
                200 if data is not None else 404,
                length=len(data or b""),
                ETag=etag(data or b""),
                Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT",
            )

        def do_PUT(self) -> None:
            name, query = self._target()
            data = self._body()
            if "uploadId" in query:
                store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = data
            elif "If-None-Match" in self.headers and name in store.objects:
                self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            else:
                store.objects[name] = data
            self._send(200, ETag=digest(data))

        def do_POST(self) -> None:
            name, query = self._target()
            body = self._body()
            if "uploads" in query:
                upload = os.urandom(8).hex()
                store.uploads[upload] = {}
                self._send(
                    200,
                    "<InitiateMultipartUploadResult><Bucket>b</Bucket>"
                    f"<Key>{escape(name)}</Key><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode(),
                )
            elif "uploadId" in query:
                parts = store.uploads.pop(query["uploadId"][0])
                store.objects[name] = b"".join(parts[number] for number in sorted(parts))
                tag = escape(etag(store.objects[name]))
                self._send(
                    200,
                    f"<CompleteMultipartUploadResult><Key>{escape(name)}</Key><ETag>{tag}</ETag>"
                    "</CompleteMultipartUploadResult>".encode(),
                )
            else:  # several objects are deleted
                keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
                for key in keys:
                    store.objects.pop(unescape(key), None)
                rows = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
                self._send(200, f"<DeleteResult>{rows}</DeleteResult>".encode())

        def do_DELETE(self) -> None:
            name, query = self._target()
            store.uploads.pop(query.get("uploadId", [""])[0], None)
            store.objects.pop(name, None)
            self._send(204)

    return Handler


WORKER = """
import json, sys
import boto3, obstore.store
import quarkconv.cloud.objects, quarkconv.convert.conversion, quarkconv.write.shares
from quarkconv.cli.main import main
print("ready", flush=True)
sys.stdin.readline()
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0, stop.code
finally:
    # ru_maxrss would include the memory of the process that started this one
    status = open("/proc/self/status").read()
    print(json.dumps({"memory": 1024 * int(status.partition("VmHWM:")[2].split()[0])}), file=sys.stderr)
"""


class Process:
    """One command, as the client of its name."""

    def __init__(self, client: str, url: str, shard_bytes: int, *options: str) -> None:
        words = ["convert", "s3://bench/model", "--to", "fused-int8", "--out", "s3://bench/out", "--quiet"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *words, "--max-shard-size", str(shard_bytes), *options],
            env={**os.environ, **credentials(client, url)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def start(self) -> None:
        """Begin; until here the process has only imported its modules."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def memory(self) -> int:
        """The most memory in bytes, when the process has ended."""
        errors = self._process.communicate()[1].decode()
        if self._process.returncode:
            sys.exit(errors)
        return int(json.loads(errors.splitlines()[-1])["memory"])


def credentials(client: str, url: str) -> dict[str, str]:
    """The environment of a client."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": client,
        "AWS_SECRET_ACCESS_KEY": "x",
    }


def convert_in_parts(url: str, workers: int, shard_bytes: int) -> tuple[float, int]:
    """Seconds, and the most memory of a worker in bytes."""
    numbers = range(1, workers + 1)
    processes = [Process(f"worker-{number}", url, shard_bytes, "--part", f"{number}/{workers}") for number in numbers]
    started = time.monotonic()
    for process in processes:
        process.start()
    memory = max([process.memory() for process in processes])
    return time.monotonic() - started, memory


def convert_on_ray(url: str, workers: int, shard_bytes: int) -> tuple[float, int]:
    """Seconds, on a cluster of so many nodes of one CPU; memory is not measured."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for number in range(1, workers + 1):
            cluster.add_node(num_cpus=1, env_vars=credentials(f"worker-{number}", url))
        driver = Process("driver", url, shard_bytes, "--ray", cluster.address)
        started = time.monotonic()
        driver.start()
        driver.memory()
        return time.monotonic() - started, 0
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rate", type=float, default=4, help="MB/s of each client in each direction")
    parser.add_argument(
        "--experts", type=int, default=16, help="of each of 8 layers; an expert has 4.7 MB, as Qwen3-30B-A3B has it"
    )
    parser.add_argument("--shards", type=int, default=32, help="of the output, about")
    parser.add_argument("--ray", action="store_true", help="nodes of a Ray cluster instead of parts")
    options = parser.parse_args()
    from support.checkpoints import make_checkpoint

    store = Store(options.rate * MB)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(store))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(
            Path(folder) / "model", layers=8, experts=options.experts, hidden=2048, intermediate=768, shards=8
        )
        for path in model.iterdir():
            store.objects[f"model/{path.name}"] = path.read_bytes()
    for data in store.objects.values():
        etag(data)
    total = sum(map(len, store.objects.values()))
    shard_bytes = total // options.shards
    url = f"http://127.0.0.1:{server.server_address[1]}"
    print(f"model {total / MB:.0f} MB, shards of {shard_bytes / MB:.0f} MB, {options.rate:g} MB/s for each client")
    print("workers  seconds    MB/s  of its bandwidth  memory  requests")
    convert = convert_on_ray if options.ray else convert_in_parts
    rates: dict[int, float] = {}
    for workers in options.workers:
        for name in [name for name in store.objects if name.startswith("out/")]:
            _tags.pop(id(store.objects.pop(name)), None)
        before = store.requests
        seconds, memory = convert(url, workers, shard_bytes)
        nbytes = sum(len(data) for name, data in store.objects.items() if name.startswith("out/"))
        rates[workers] = rate = nbytes / MB / seconds
        print(
            f"{workers:7} {seconds:8.1f} {rate:7.2f} {rate / workers / options.rate:17.0%} {memory / MB:4.0f} MB "
            f"{store.requests - before:9}",
            flush=True,
        )
    fewest = min(rates)
    ratios = (f"{workers}: {rate / rates[fewest] * fewest:.2f}" for workers, rate in sorted(rates.items()))
    print(f"times one worker's rate: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
