"""A Hub on loopback, with huggingface_hub pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, start_hub
from huggingface_hub import constants

from quarkconv import hub as hub_module
from quarkconv.files import hub_repo


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub; the cache and the token of this machine are out of reach."""
    made, servers = start_hub()
    cache = tmp_path / "hf"
    for name, value in (
        ("ENDPOINT", made.url), ("HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(cache / "hub")), ("HF_TOKEN_PATH", str(cache / "token")),
        ("HF_HUB_DISABLE_XET", True), ("HF_HUB_DISABLE_PROGRESS_BARS", True), ("HF_HUB_DOWNLOAD_TIMEOUT", 5),
    ):  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_repo, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(hub_module, "_LISTING_WAIT", 0.01)
    yield made
    for server in servers:
        server.shutdown()
        server.server_close()
