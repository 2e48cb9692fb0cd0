"""Conversions to an object store that fail, are killed or lose the network: they resume, and leave nothing behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.bucket_outputs import OPTIONS, convert, interrupted, prepare
from support.conversions import SMALL_STEPS
from support.faulty_proxy import FaultyProxy
from support.program import PROCESS_TIMEOUT, run_cli
from support.progress import AfterAdvances
from support.s3 import OUT, URL, objects, put

import quarkconv
from quarkconv.cloud import uploads
from quarkconv.cloud.objects import Objects
from quarkconv.cloud.uploads import list_uploads
from quarkconv.errors import UsageError, WriteError
from quarkconv.progress import SILENT

pytestmark = pytest.mark.long(15)

Capture = pytest.CaptureFixture[str]


@pytest.mark.usefixtures("small_parts")
def test_a_failed_conversion_is_not_a_model_and_resumes(
    published: FaultyProxy, model: Path, local: dict[str, str], capsys: Capture
) -> None:
    interrupted(model, 3)
    left = objects()
    assert "config.json" not in left
    assert list_uploads(OUT) == []
    finished = [name for name in left if name.endswith(".safetensors")]
    assert finished
    code, out, _ = run_cli(capsys, "inspect", OUT, "--json")
    error = json.loads(out)
    assert (code, error["code"]) == (3, "conversion-unfinished")
    assert OUT in error["hint"]
    published.requests.clear()
    convert(model)
    assert objects() == local
    written = {
        path.split("?")[0].rpartition("/")[2] for method, path in published.requests if method in ("PUT", "POST")
    }
    assert not written & set(finished)
    assert written & {name for name in local if name.endswith(".safetensors")}


@pytest.mark.usefixtures("published")
def test_a_shard_that_was_replaced_is_written_again(model: Path, local: dict[str, str]) -> None:
    interrupted(model, 3)
    name = next(name for name in objects() if name.endswith(".safetensors"))
    size = Objects(OUT).entries()[name].size
    put(f"{OUT}/{name}", bytes(size))
    convert(model)
    assert objects() == local


@pytest.mark.usefixtures("published")
def test_another_conversion_does_not_resume(model: Path) -> None:
    interrupted(model, 3)
    before = objects()
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        convert(model, max_shard_size=50_000)
    assert caught.value.found == "largest shard size 40000, now 50000"
    assert objects() == before
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        quarkconv.convert_checkpoint(model, "bf16", OUT, **OPTIONS)  # its shards have other names
    assert caught.value.found == "target fused-int8, now bf16"
    assert objects() == before


@pytest.mark.usefixtures("small_parts")
def test_a_process_goes_on_with_one_shard_without_a_listing(published: FaultyProxy, local: dict[str, str]) -> None:
    conversion = prepare(URL)
    execution = conversion._execution(conversion.outputs[0], 2, SILENT)
    shard = execution.plan.shards[-1]

    def written() -> int:
        published.requests.clear()
        with execution.opened() as sources, execution.rejoined(sources, shard) as run, run.writing():
            run.write_shards((shard,), 2)
        assert not [path for method, path in published.requests if method == "GET" and "list-type" in path]
        return sum(method == "PUT" and shard.file in path for method, path in published.requests)

    with pytest.raises(UsageError, match="Another process has finished"):
        written()
    with execution.opened() as sources, execution.joined(sources):
        pass
    assert written() > 2
    assert written() == 0
    put(f"{OUT}/{shard.file}", b"another object")
    assert written() > 2
    assert shard.file in objects()
    conversion.carry_out()
    assert objects() == local


KILLED = (
    SMALL_STEPS.replace("2**20,", "2**14,").replace("2**18", "2**14")
    + """
import quarkconv.cloud.objects
quarkconv.cloud.objects.PART_BYTES = 2**14
main(sys.argv[1:])
"""
)


def test_a_conversion_that_is_killed_resumes_and_leaves_nothing(published: FaultyProxy, local: dict[str, str]) -> None:
    words = ["convert", URL, "--to", "fused-int8", "--out", OUT, "--max-shard-size", "40000", "--jobs", "2"]
    rng, killed = random.Random(1), 0
    published.slow = 0.02
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", KILLED, *words], stderr=subprocess.PIPE)
        if attempt < 7:
            try:
                process.wait(rng.uniform(0.6, 1.6))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        errors = process.communicate(timeout=PROCESS_TIMEOUT)[1].decode()
        if "config.json" in objects() and not any(name.startswith(".quarkconv/plan") for name in objects()):
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert killed > 1
    assert {name: found for name, found in objects().items() if not name.startswith(".quarkconv/notes")} == local
    assert list_uploads(OUT) == []


def test_uploads_of_a_dead_run_are_listed_and_discarded(
    published: FaultyProxy, model: Path, capsys: Capture, local: dict[str, str]
) -> None:
    import boto3

    def leave(name: str) -> None:
        client, key = boto3.client("s3", region_name="us-east-1"), f"out/tiny-moe/{name}"
        upload = client.create_multipart_upload(Bucket="models", Key=key)["UploadId"]
        client.upload_part(Bucket="models", Key=key, UploadId=upload, PartNumber=1, Body=bytes(10_000))

    shard = next(name for name in local if name.endswith(".safetensors"))
    leave(shard)
    leave("other.bin")
    code, out, _ = run_cli(capsys, "uploads", OUT, "--json")
    value = json.loads(out)
    assert (code, value["schema"], value["aborted"]) == (0, "quarkconv.uploads/1", False)
    assert [item["name"] for item in value["uploads"]] == [shard, "other.bin"]
    assert [item["nbytes"] for item in value["uploads"]] == [10_000, 10_000]
    convert(model)  # discards those of its own shards alone
    assert [upload.name for upload in list_uploads(OUT)] == ["other.bin"]
    code, out, _ = run_cli(capsys, "uploads", OUT, "--abort")
    assert code == 0
    assert "other.bin" in out
    assert run_cli(capsys, "uploads", OUT)[1] == "No unfinished uploads.\n"
    published.deny = ("GET",)
    code, out, _ = run_cli(capsys, "uploads", OUT, "--json")
    assert (code, "ListBucketMultipartUploads" in json.loads(out)["hint"]) == (5, True)
    assert run_cli(capsys, "uploads", "gs://bucket/path")[0] == 4


@pytest.mark.usefixtures("published")
def test_an_upload_that_ends_while_uploads_are_listed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    client = boto3.client("s3")
    keys = [f"out/tiny-moe/{name}" for name in ("first", "second")]
    started = [client.create_multipart_upload(Bucket="models", Key=key)["UploadId"] for key in keys]
    original = uploads._parts_nbytes

    def end_first(client: Any, bucket: str, upload: dict[str, Any]) -> int | None:
        if upload["UploadId"] == started[0]:
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=started[0])
        return original(client, bucket, upload)

    monkeypatch.setattr(uploads, "_parts_nbytes", end_first)
    assert [(upload.name, upload.nbytes) for upload in list_uploads(OUT)] == [("second", 0)]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("fault", "status"), [("refuse_puts", 503), ("refuse_puts", 429), ("refuse_puts", 500), ("reset_puts", 0)]
)
def test_uploads_that_fail_are_tried_again(
    published: FaultyProxy, model: Path, local: dict[str, str], fault: str, status: int
) -> None:
    published.status = status
    setattr(published, fault, 4)
    convert(model)
    assert getattr(published, fault) == 0
    assert objects() == local
    assert list_uploads(OUT) == []


@pytest.mark.usefixtures("small_parts")
def test_credentials_that_expire_meanwhile_end_the_run_which_then_resumes(
    published: FaultyProxy, model: Path, local: dict[str, str]
) -> None:
    def expire() -> None:
        published.deny = ("PUT", "POST")

    with pytest.raises(WriteError, match="refuses access") as caught:
        convert(model, progress=AfterAdvances(3, expire), jobs=1)
    assert "resumes" in (caught.value.hint or "")
    published.deny = ()
    assert "config.json" not in objects()
    convert(model)
    assert objects() == local
    assert list_uploads(OUT) == []
