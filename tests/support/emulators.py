"""Emulators of Azure's and Google's object stores, as processes. ``make test-emulators`` installs them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

AZURITE = os.environ.get("AZURITE", "")
FAKE_GCS_SERVER = os.environ.get("FAKE_GCS_SERVER", "")
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's account and key, the same for everybody: https://learn.microsoft.com/azure/storage/common/storage-use-azurite."""
_VERSION = "2021-08-06"


@contextmanager
def azurite() -> Iterator[dict[str, str]]:
    """Run Azurite with a container ``models``; yields the environment that leads to it."""
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with _running([AZURITE, *options, "--blobPort", str(port)], port):
        date = formatdate(usegmt=True)
        resource = f"/{ACCOUNT}/{ACCOUNT}/models\nrestype:container"
        signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{_VERSION}\n{resource}"
        signature = base64.b64encode(hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest())
        headers = {
            "Authorization": f"SharedKey {ACCOUNT}:{signature.decode()}",
            "Content-Type": "",
            "x-ms-date": date,
            "x-ms-version": _VERSION,
        }
        urlopen(Request(f"{endpoint}/models?restype=container", b"", headers, method="PUT")).close()
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": endpoint,
            "AZURE_ALLOW_HTTP": "true",
        }


@contextmanager
def fake_gcs_server(model: Path, prefix: str) -> Iterator[dict[str, str]]:
    """Run fake-gcs-server with a model in its bucket ``models``; yields the environment that leads to it.

    It has no PUT of the XML API, with which obstore writes, so that objects are put here.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    with _running([FAKE_GCS_SERVER, *options, "-public-host", f"127.0.0.1:{port}"], port):
        json_type = {"Content-Type": "application/json"}
        urlopen(Request(f"{url}/storage/v1/b", b'{"name": "models"}', json_type)).close()
        for path in model.rglob("*"):
            if path.is_file():
                name = quote(f"{prefix}/{path.relative_to(model).as_posix()}", safe="")
                address = f"{url}/upload/storage/v1/b/models/o?uploadType=media&name={name}"
                urlopen(Request(address, path.read_bytes(), method="POST")).close()
        account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
        account_json = json.dumps({**account, "private_key_id": ""})
        yield {"GOOGLE_SERVICE_ACCOUNT_KEY": account_json, "GOOGLE_ALLOW_HTTP": "true"}


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(30)
