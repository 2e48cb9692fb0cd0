"""Models in object stores, read from an S3 server and through a proxy that spoils responses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.conversions import assert_unfinished
from support.faulty_proxy import FaultyProxy
from support.program import run_cli, snapshot
from support.progress import AfterAdvances, FullDisk
from support.s3 import URL, publish

import quarkconv
from quarkconv.cloud import stores
from quarkconv.cloud.bucket import open_bucket
from quarkconv.errors import SourceError, UsageError, WriteError
from quarkconv.files.base import Range
from quarkconv.hub.locate import locate

Capture = pytest.CaptureFixture[str]


def convert(model: str | Path, out: Path, **options: Any) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", out, **{"max_shard_size": 40_000, "jobs": 2, **options})


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("options", [[], ["--deep"]])
def test_inspect_answers_as_of_the_directory(model: Path, capsys: Capture, options: list[str]) -> None:
    code, out, err = run_cli(capsys, "inspect", URL, "--json", *options)
    assert (code, err) == (0, "")
    remote, local = json.loads(out), json.loads(run_cli(capsys, "inspect", model, "--json", *options)[1])
    assert remote.pop("model") == URL
    local.pop("model")
    assert remote == local


def test_inspect_reads_headers_only(published: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarkconv.headers.remote.FIRST_GUESS", 4096)
    files = open_bucket(URL)
    total = sum(entry.size for entry in files.entries.values())
    description = quarkconv.inspect_checkpoint(URL).description
    read = sum(int(last) - int(first) + 1 for first, last in (text[6:].split("-") for text in published.ranges))
    assert description.int8_layers
    assert read < total / 3


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("url", [URL, f"{URL}/"])
def test_convert_gives_the_bytes_of_the_directory(model: Path, tmp_path: Path, url: str) -> None:
    result = convert(url, tmp_path / "remote")
    assert result.source == URL
    convert(model, tmp_path / "local")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")


@pytest.mark.usefixtures("published")
def test_the_output_lies_in_the_working_directory(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(capsys, "convert", URL, "--to", "fused-int8")[0] == 0
    assert (tmp_path / "tiny-moe-fused-int8" / "config.json").is_file()


@pytest.mark.usefixtures("proxy")
def test_a_folder_in_the_model_may_have_the_path_of_the_model(model: Path) -> None:
    (model / "org" / "tiny-moe").mkdir(parents=True)
    (model / "org" / "tiny-moe" / "config.json").write_text("{}")
    publish(model)
    sizes = {name: entry.size for name, entry in open_bucket(URL).entries.items()}
    assert sizes["org/tiny-moe/config.json"] == 2
    assert sizes["config.json"] == (model / "config.json").stat().st_size


@pytest.mark.usefixtures("published")
def test_a_conversion_that_failed_resumes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(WriteError):
        convert(URL, out, progress=FullDisk(4), jobs=1)
    finished = {path.name: path.stat().st_mtime_ns for path in (out / ".quarkconv" / "files").glob("*.safetensors")}
    assert finished
    convert(URL, out)
    convert(model, tmp_path / "local")
    assert snapshot(out) == snapshot(tmp_path / "local")
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.usefixtures("published")
def test_a_file_that_is_replaced_is_noticed(model: Path, tmp_path: Path) -> None:
    ref = quarkconv.inspect_checkpoint(model).description.checkpoint.refs()["lm_head.weight"]

    def change() -> None:
        data = bytearray((model / ref.file).read_bytes())
        data[ref.start] ^= 1
        (model / ref.file).write_bytes(data)
        publish(model)

    files = open_bucket(URL)
    assert files.fetch(Range(ref.file, 8, 100)) == (model / ref.file).read_bytes()[8:100]
    change()
    for check in (lambda: files.fetch(Range(ref.file, 8, 100)), lambda: files.check_unchanged([ref.file])):
        with pytest.raises(SourceError, match="has changed since it was listed") as caught:
            check()
        assert (caught.value.code, caught.value.file) == ("source-changed", f"{URL}/{ref.file}")
    out = tmp_path / "out"
    with pytest.raises(SourceError, match="has changed since it was listed"):
        convert(URL, out, progress=AfterAdvances(1, change), jobs=1)
    assert_unfinished(out)


def test_a_file_that_is_replaced_is_noticed_by_the_etag_of_the_response(published: FaultyProxy, model: Path) -> None:
    files = open_bucket(URL)
    published.ignore_conditions = True
    assert files.fetch(Range("config.json", 0, 9)) == (model / "config.json").read_bytes()[:9]
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("4", "5"))
    publish(model)
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        files.fetch(Range("config.json", 0, 9))
    assert caught.value.code == "source-changed"


@pytest.mark.parametrize("fault", ["refuse", "cut"])
def test_responses_that_fail_are_requested_again(
    published: FaultyProxy, model: Path, tmp_path: Path, fault: str
) -> None:
    setattr(published, fault, 3)
    convert(URL, tmp_path / "remote")
    assert getattr(published, fault) == 0
    convert(model, tmp_path / "local")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")


def test_bytes_of_another_range_are_refused(published: FaultyProxy, tmp_path: Path) -> None:
    plan = quarkconv.plan_conversion(URL, "fused-int8")
    assert plan.shards
    published.lie = True
    with pytest.raises(SourceError) as caught:
        convert(URL, tmp_path / "out")
    assert caught.value.code == "store-unavailable"
    assert not (tmp_path / "out").exists()


def test_refused_access_names_the_credentials(published: FaultyProxy, capsys: Capture) -> None:
    published.refuse, published.status = 10**6, 403
    code, out, _ = run_cli(capsys, "inspect", URL, "--json")
    error = json.loads(out)
    assert (code, error["code"]) == (3, "store-unavailable")
    assert "AWS_ACCESS_KEY_ID" in error["hint"]
    assert "secret" not in out


@pytest.mark.parametrize(("status", "code"), [(301, ""), (403, "AuthorizationHeaderMalformed")])
def test_a_bucket_in_another_region_is_named(published: FaultyProxy, capsys: Capture, status: int, code: str) -> None:
    if code:
        published.deny, published.deny_code = ("GET",), code
    else:
        published.refuse, published.status = 10**6, status
    found, out, _ = run_cli(capsys, "inspect", URL, "--json")
    assert (found, json.loads(out)["error"]) == (3, "The bucket is in another region")
    assert "AWS_REGION" in json.loads(out)["hint"]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("url", "message"), [("s3://nothing/here", "bucket does not exist"), ("s3://models/other", "URL has no files")]
)
def test_what_is_not_there_is_named(capsys: Capture, url: str, message: str) -> None:
    code, out, _ = run_cli(capsys, "inspect", url, "--json")
    error = json.loads(out)
    assert (code, error["file"]) == (3, url)
    assert message in error["error"]


@pytest.mark.usefixtures("proxy")
def test_a_store_that_cannot_be_reached(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, out, _ = run_cli(capsys, "inspect", URL, "--json")
    assert (code, json.loads(out)["code"]) == (3, "store-unavailable")


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("words", [["convert", URL, "--to", "bf16", "--cache"], ["inspect", "s3://"]])
def test_what_object_stores_cannot_do_is_wrong_usage(capsys: Capture, words: list[str]) -> None:
    code, out, err = run_cli(capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("error:") == 1


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError) as caught:
        locate(URL)
    assert "pip install obstore" in (caught.value.hint or "")
