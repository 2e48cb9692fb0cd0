"""Networks with nothing but a proxy: every request goes through it, and its faults are reported."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]
from huggingface_hub.utils._xet import abort_xet_session
from support.conversions import assert_converts_alike
from support.hub_server import start_hub
from support.hub_state import Hub
from support.program import run_cli
from support.proxy_server import Proxy, start_proxy

import quarkconv
from quarkconv.errors import HubError
from quarkconv.files.base import Range
from quarkconv.headers import remote as remote_headers
from quarkconv.hub.locate import locate
from quarkconv.hub.repo import HubRepo

REPO = "org/tiny-moe"
NAMES = ("hub.test", "store.test")
Capture = pytest.CaptureFixture[str]
UseProxy = Callable[..., None]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy_state, server = start_proxy()
    yield proxy_state
    server.shutdown()
    server.server_close()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> UseProxy:
    """Sets variables for the client of the next requests."""

    def variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        close_session()

    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    return variables


@pytest.fixture
def behind(hub: Hub, proxy: Proxy, model: Path, point_at: Callable[[str], None]) -> Hub:
    """A Hub and a store with names that only the proxy knows."""
    hub.publish(REPO, model)
    for name, url in zip(NAMES, (hub.url, hub.store_url), strict=True):
        proxy.hosts[name] = int(url.rpartition(":")[2])
    hub.url, hub.store_url = (f"http://{name}" for name in NAMES)
    point_at(hub.url)
    return hub


@pytest.fixture
def encrypted(
    proxy: Proxy, model: Path, tmp_path: Path, point_at: Callable[[str], None], use: UseProxy
) -> Iterator[Hub]:
    """The same over TLS, with a certificate of an authority that only SSL_CERT_FILE contains."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl, to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", f"subjectAltName={','.join(f'DNS:{name}' for name in NAMES)}",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hub, servers = start_hub(tls=context)
    hub.publish(REPO, model)
    for name, server in zip(NAMES, servers, strict=True):
        proxy.hosts[name] = server.server_address[1]
    hub.url, hub.store_url = (f"https://{name}" for name in NAMES)
    point_at(hub.url)
    use(SSL_CERT_FILE=str(certificate))
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_went_through(proxy: Proxy, hub: Hub) -> None:
    assert hub.requests
    assert hub.peers <= proxy.peers, "a request came by another way"


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_everything_goes_through_the_proxy(
    behind: Hub, proxy: Proxy, model: Path, tmp_path: Path, use: UseProxy, variable: str
) -> None:
    use(**{variable: proxy.url})
    assert quarkconv.inspect_checkpoint(REPO, deep=True).ok
    assert_went_through(proxy, behind)
    assert_converts_alike(REPO, model, tmp_path)
    assert_went_through(proxy, behind)
    seen = [
        (method, address, requested) for method, address, requested in proxy.requests if method == "GET" and requested
    ]
    assert len(seen) == len(behind.ranges()) > 5
    assert {address.split("/")[2] for _, address, _ in seen} == set(NAMES)


def test_everything_goes_through_the_proxy_encrypted(
    encrypted: Hub, proxy: Proxy, model: Path, tmp_path: Path, use: UseProxy
) -> None:
    use(HTTPS_PROXY=proxy.url)
    assert quarkconv.inspect_checkpoint(REPO, deep=True).ok
    assert_converts_alike(REPO, model, tmp_path)
    assert_went_through(proxy, encrypted)
    assert encrypted.ranges()
    assert {(method, address) for method, address, _ in proxy.requests} == {
        ("CONNECT", f"{name}:443") for name in NAMES
    }


def test_downloads_of_hf_xet_go_through_it_too(
    behind: Hub, proxy: Proxy, tmp_path: Path, use: UseProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    behind.xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    use(HTTP_PROXY=proxy.url, HF_XET_CACHE=str(tmp_path / "xet"), HF_HUB_DISABLE_TELEMETRY="1")
    abort_xet_session()  # the next one reads the environment again
    quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "out", cache=True)
    abort_xet_session()
    assert any("/xorbs/" in address for _, address, _ in proxy.requests)
    assert_went_through(proxy, behind)


@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_no_proxy_goes_past_it(
    hub: Hub, proxy: Proxy, model: Path, tmp_path: Path, use: UseProxy, variable: str
) -> None:
    hub.publish(REPO, model)
    use(**{"HTTP_PROXY": proxy.url, variable: "example.org,127.0.0.1,localhost"})
    quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "out")
    assert proxy.requests == []
    assert hub.ranges()


@pytest.mark.usefixtures("behind")
def test_a_proxy_gets_user_and_password(proxy: Proxy, use: UseProxy) -> None:
    proxy.login = "anna:pass word"
    use(HTTP_PROXY=f"http://anna:pass%20word@127.0.0.1:{proxy.port}")
    assert quarkconv.inspect_checkpoint(REPO).ok


def refusal(capsys: Capture, *arguments: str | Path) -> tuple[dict[str, str], str]:
    """The one message of a command that fails for want of the source."""
    code, out, err = run_cli(capsys, *arguments, "--json")
    assert code == 3, err
    error: dict[str, str] = json.loads(out)
    assert error["code"] == "hub-unavailable"
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert "secret" not in out + err, "the password of the proxy"
    return error, err


COMMANDS = [["inspect", REPO], ["convert", REPO, "--to", "fused-int8"], ["convert", REPO, "--to", "bf16", "--cache"]]


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_proxy_that_requires_a_password_is_named(
    proxy: Proxy, use: UseProxy, capsys: Capture, command: list[str]
) -> None:
    proxy.login = "anna:right"
    use(HTTP_PROXY=f"http://anna:secret@127.0.0.1:{proxy.port}")
    error, _ = refusal(capsys, *command)
    assert "proxy" in error["error"]
    assert "407" in error["found"]
    assert error["hint"].startswith("HTTP_PROXY needs a user and password")
    assert f"127.0.0.1:{proxy.port}" in error["expected"]


@pytest.mark.usefixtures("encrypted")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_proxy_that_requires_a_password_for_a_tunnel_is_named(
    proxy: Proxy, use: UseProxy, capsys: Capture, command: list[str]
) -> None:
    proxy.refuse = 407
    use(https_proxy=f"http://anna:secret@127.0.0.1:{proxy.port}")
    error, _ = refusal(capsys, *command)
    assert "proxy" in error["error"]
    assert "407" in error["found"]
    assert error["hint"].startswith("https_proxy needs a user and password")


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_proxy_that_is_not_there(use: UseProxy, capsys: Capture, command: list[str]) -> None:
    use(ALL_PROXY="http://anna:secret@127.0.0.1:9")
    error, _ = refusal(capsys, *command)
    assert error["error"] == "The Hub cannot be reached through the proxy"
    assert error["expected"] == "a response from http://hub.test through http://127.0.0.1:9"
    assert "refused" in error["found"]
    assert "ALL_PROXY" in error["hint"]
    assert "hub.test to NO_PROXY" in error["hint"]


def test_an_upload_names_the_proxy_too(
    behind: Hub, model: Path, tmp_path: Path, use: UseProxy, capsys: Capture
) -> None:
    use(HTTP_PROXY="http://anna:secret@127.0.0.1:9")
    code, out, _ = run_cli(
        capsys, "convert", model, "--to", "bf16", "--out", tmp_path / "out", "--push", "org/new", "--json"
    )
    assert code == 5
    assert "HTTP_PROXY" in json.loads(out)["hint"]
    assert "secret" not in out
    assert behind.requests == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["ftp://anna:secret@127.0.0.1:9", "http://anna:secret@127.0.0.1:port", "socks5://x:1"]
)
@pytest.mark.usefixtures("behind")
def test_an_invalid_address_of_a_proxy_is_named(use: UseProxy, capsys: Capture, address: str) -> None:
    use(HTTP_PROXY=address)
    error, _ = refusal(capsys, "inspect", REPO)
    assert error["error"] == "The proxy cannot be used"
    assert "HTTP_PROXY" in error["hint"]


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("command", COMMANDS[:2])
def test_a_proxy_that_answers_with_a_page_is_named(
    proxy: Proxy, use: UseProxy, capsys: Capture, command: list[str]
) -> None:
    proxy.page = b"<html>Please log in</html>"
    use(HTTP_PROXY=proxy.url)
    error, _ = refusal(capsys, *command)
    assert error["error"] == "The response is not from a Hub"
    assert "HF_ENDPOINT" in error["hint"]
    assert f"HTTP_PROXY, which is {proxy.url}" in error["hint"]


def test_what_a_proxy_cuts_off_is_requested_again(
    behind: Hub, proxy: Proxy, model: Path, tmp_path: Path, use: UseProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_GUESS", 4096)
    proxy.cuts, proxy.cut_after = 8, 1000
    use(HTTP_PROXY=proxy.url)
    assert_converts_alike(REPO, model, tmp_path)
    assert proxy.cuts == 0
    assert any(requested.startswith("bytes=1000-") for requested in behind.ranges())


@pytest.mark.usefixtures("encrypted")
def test_a_proxy_that_cuts_some_tunnels_changes_nothing(
    proxy: Proxy, model: Path, tmp_path: Path, use: UseProxy
) -> None:
    proxy.cuts, proxy.cut_after = 6, 20_000
    use(HTTPS_PROXY=proxy.url)
    assert_converts_alike(REPO, model, tmp_path)
    assert proxy.cuts == 0


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("command", COMMANDS[:2])
def test_a_proxy_that_cuts_every_answer_is_named(
    proxy: Proxy, use: UseProxy, capsys: Capture, command: list[str]
) -> None:
    proxy.cuts = 10**6
    use(HTTP_PROXY=proxy.url)
    error, _ = refusal(capsys, *command)
    assert error["error"] == "The Hub cannot be reached through the proxy"
    assert "HTTP_PROXY" in error["hint"]


@pytest.mark.usefixtures("encrypted")
def test_a_request_to_a_busy_proxy_is_retried(proxy: Proxy, use: UseProxy) -> None:
    use(HTTPS_PROXY=proxy.url)
    source = locate(REPO).files
    for busy in (3, 5):  # while a file is located, and while its bytes are fetched
        proxy.busy = busy
        assert isinstance(source, HubRepo)
        assert source.fetch(Range("model-00001-of-00002.safetensors", 8, 1000))
        assert proxy.busy < 0
        close_session()
    proxy.refuse = 502
    with pytest.raises(HubError, match="through the proxy"):
        quarkconv.inspect_checkpoint(REPO)


def test_a_certificate_that_is_not_trusted(
    encrypted: Hub, proxy: Proxy, use: UseProxy, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a proxy opens what is encrypted, and shows a certificate of its own."""
    monkeypatch.delenv("SSL_CERT_FILE")
    use(HTTPS_PROXY=proxy.url)
    error, _ = refusal(capsys, "inspect", REPO)
    assert error["error"] == "The certificate of the Hub is not trusted"
    assert "SSL_CERT_FILE" in error["hint"]
    assert encrypted.requests == []
