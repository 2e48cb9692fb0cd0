"""An S3 server, and a bucket with a model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from support.bucket_outputs import convert
from support.checkpoints import make_checkpoint
from support.faulty_proxy import FaultyProxy, faulty_proxy
from support.program import snapshot
from support.s3 import publish

from quarkconv.cloud import objects as cloud_objects
from quarkconv.write import executor

pytest.importorskip("obstore")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a moto server; moto is imported here, since every worker imports every module of tests."""
    pytest.importorskip("moto")
    import moto.s3.models
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication as Dispatcher
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = 1  # type: ignore[attr-defined]  # so that small shards have several parts
    # It lists all of moto's folders, and matches all of its patterns, for every request.
    Dispatcher.get_backend_for_host = functools.cache(Dispatcher.get_backend_for_host)  # type: ignore[method-assign]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """An empty S3 server behind a proxy; the environment leads to the proxy."""
    urlopen(Request(f"{server}/moto-api/reset", method="POST")).close()
    urlopen(Request(f"{server}/models", method="PUT")).close()
    with faulty_proxy(server) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield proxy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model as a directory."""
    folder = make_checkpoint(tmp_path / "model", layers=2, experts=4, hidden=128, intermediate=96, zero_points=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b c")
    return folder


@pytest.fixture
def published(proxy: FaultyProxy, model: Path) -> FaultyProxy:
    """The S3 server with the model."""
    publish(model)
    return proxy


@pytest.fixture
def local(model: Path, tmp_path: Path) -> dict[str, str]:
    """The output as a directory has it."""
    convert(model, tmp_path / "local")
    return snapshot(tmp_path / "local")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that every shard has several, of several blocks each."""
    monkeypatch.setattr(cloud_objects, "PART_BYTES", 8192)
    monkeypatch.setattr(executor, "BUFFER_BYTES", 4096)
