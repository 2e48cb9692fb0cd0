"""URLs and settings of object stores: what no request can be made with is wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.program import run_cli, snapshot
from support.s3 import URL, objects

import quarkconv
from quarkconv.cloud.bucket import Bucket
from quarkconv.cloud.stores import open_store
from quarkconv.cloud.uploads import list_uploads
from quarkconv.errors import UsageError, WriteError
from quarkconv.files.remote import Entry

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"])
@pytest.mark.parametrize("value", ["", "localhost:9000", "http://", "ftp://localhost", "http://a b", " http://a"])
@pytest.mark.usefixtures("proxy")
def test_an_endpoint_that_is_no_url_is_wrong_usage(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    code, out, _ = run_cli(capsys, "inspect", URL, "--json")
    assert (code, json.loads(out)["found"]) == (2, f"{name}={value!r}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    open_store("az://container/path")  # of another service


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"])
@pytest.mark.usefixtures("proxy")
def test_a_line_break_in_credentials_is_named_and_not_shown(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "hidden\n")
    code, out, _ = run_cli(capsys, "inspect", URL, "--json")
    error = json.loads(out)
    assert code == 2
    assert error["error"].startswith(f"{name} has a line break")
    assert "hidden" not in out


@pytest.mark.parametrize(
    "url",
    ["s3://models/org//x", "s3://models/../x", "s3://models/./x", "s3://me:secret@models/x", "s3://mod els/x",
     "s3://models:80/x", "s3://models/a\nb"],
)  # fmt: skip
@pytest.mark.usefixtures("proxy")
def test_urls_that_name_another_object_to_a_client_are_wrong_usage(capsys: Capture, url: str) -> None:
    code, out, _ = run_cli(capsys, "inspect", url, "--json")
    assert (code, json.loads(out)["error"]) == (2, "Invalid URL of an object store")


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("path", ["with space", "a%20b", "what?c#d", "x+y&z=1", "ü/[a]{b}|c^d"])
def test_a_path_is_taken_as_it_is(model: Path, tmp_path: Path, path: str) -> None:
    import boto3

    url = f"s3://models/{path}/out"
    quarkconv.convert_checkpoint(URL, "fused-int8", url)
    local = snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out").output)
    client = boto3.client("s3")
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="models", Prefix=path)["Contents"]]
    assert sorted(keys) == [f"{path}/out/{name}" for name in sorted(local)]
    upload = client.create_multipart_upload(Bucket="models", Key=f"{path}/out/x.safetensors")["UploadId"]
    assert [(found.name, found.upload_id) for found in list_uploads(url)] == [("x.safetensors", upload)]
    assert quarkconv.verify_checkpoint(url, stages=["bytes"]).ok
    assert objects("s3://models/org/tiny-moe").keys() == {path.relative_to(model).as_posix() for path in files(model)}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_account_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="account of the object store is not set") as caught:
        open_store("az://container/path")
    assert "AZURE_STORAGE_ACCOUNT_NAME" in (caught.value.expected or "")


@pytest.mark.usefixtures("proxy")
def test_messages_name_the_url_with_both_slashes() -> None:
    files = Bucket("s3://models/x", open_store("s3://models/x"), {"a": Entry(1, "e")})
    assert (str(files.root), f"{files.root}/a", files.root.name) == ("s3://models/x", "s3://models/x/a", "x")


@pytest.mark.usefixtures("proxy")
def test_uploads_of_a_bucket_that_does_not_exist() -> None:
    with pytest.raises(WriteError, match="bucket does not exist"):
        list_uploads("s3://nothing/here")
