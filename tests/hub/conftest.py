"""A Hub on loopback, with huggingface_hub pointed at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]
from support.checkpoints import make_checkpoint
from support.hub_server import start_hub
from support.hub_state import Hub

from quarkconv.files import http as http_client


@pytest.fixture
def point_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Points huggingface_hub at an address; the cache, the token and the proxies of this machine are out of reach."""
    cache = tmp_path / "hf"
    for name, value in (
        ("HF_HUB_CACHE", str(cache / "hub")), ("HF_TOKEN_PATH", str(cache / "token")), ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_DISABLE_PROGRESS_BARS", True), ("HF_HUB_DOWNLOAD_TIMEOUT", 5),
    ):  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    # Else it requests this table from a test's Hub, and keeps the response for other tests, and in the user's cache.
    with suppress(ImportError):  # of other versions
        monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", {"standardEnvVars": [], "harnesses": {}})
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.01)

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    close_session()  # the client reads the environment when it is made
    yield point
    close_session()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small checkpoint on disk."""
    return make_checkpoint(tmp_path / "model", experts=4, hidden=128, intermediate=96)


@pytest.fixture
def hub(point_at: Callable[[str], None]) -> Iterator[Hub]:
    """An empty Hub."""
    started, servers = start_hub()
    point_at(started.url)
    yield started
    for server in servers:
        server.shutdown()
        server.server_close()
