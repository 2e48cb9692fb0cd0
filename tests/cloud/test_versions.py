"""Buckets that keep versions of objects, and buckets with object lock: the output, and what may be deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.faulty_proxy import FaultyProxy
from support.program import run_cli, snapshot
from support.progress import Stop
from support.s3 import objects

import quarkconv
from quarkconv.cloud.uploads import list_uploads
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.write.modes import Join

pytestmark = pytest.mark.long(10)

OUT = "s3://kept/out/tiny-moe"
Capture = pytest.CaptureFixture[str]


def convert(model: Path, **options: Any) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", OUT, **{"max_shard_size": 40_000, "jobs": 2, **options})


@pytest.fixture(params=["versions", "object lock"])
def kept(request: pytest.FixtureRequest, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of boto3, of a bucket that keeps versions, or one where each version is locked for a day as well."""
    import boto3

    client = boto3.client("s3", region_name="us-east-1", endpoint_url=proxy.url)
    locked = request.param == "object lock"
    client.create_bucket(Bucket="kept", ObjectLockEnabledForBucket=locked)
    if locked:
        retention = {"Mode": "COMPLIANCE", "Days": 1}
        rule = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": retention}}
        client.put_object_lock_configuration(Bucket="kept", ObjectLockConfiguration=rule)
        monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "SHA256")
    else:
        client.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Enabled"})
    return client


@pytest.fixture
def local(model: Path, tmp_path: Path) -> dict[str, str]:
    """The output as a directory has it."""
    options: dict[str, Any] = {"max_shard_size": 40_000}
    return snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local", **options).output)


def versions(client: Any) -> dict[str, int]:
    """The number of versions of each object, without markers of deletion."""
    found: dict[str, int] = {}
    for page in client.get_paginator("list_object_versions").paginate(Bucket="kept"):
        for item in page.get("Versions", ()):
            found[item["Key"]] = found.get(item["Key"], 0) + 1
    return found


def test_the_output_is_that_of_a_directory_and_each_shard_is_written_once(
    kept: Any, model: Path, local: dict[str, str]
) -> None:
    convert(model)
    assert objects(OUT) == local
    shards = {name: count for name, count in versions(kept).items() if name.endswith(".safetensors")}
    assert set(shards.values()) == {1}
    assert list_uploads(OUT) == []
    assert quarkconv.verify_checkpoint(OUT, model, "cpu", stages=["bytes"]).ok


@pytest.mark.usefixtures("kept")
def test_a_conversion_that_failed_resumes(model: Path, local: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        convert(model, progress=Stop(3), jobs=1)
    assert "config.json" not in objects(OUT)
    convert(model)
    assert objects(OUT) == local


def test_overwrite_hides_what_quarkconv_wrote_and_deletes_no_version(
    kept: Any, model: Path, local: dict[str, str]
) -> None:
    convert(model, max_shard_size=20_000)
    before = versions(kept)
    convert(model, overwrite=True)
    assert objects(OUT) == local
    after = versions(kept)
    assert all(after[name] >= count for name, count in before.items())


@pytest.mark.usefixtures("kept")
def test_workers_take_leases_there(model: Path, local: dict[str, str]) -> None:
    conversion = Conversion.prepare(model, "fused-int8", OUT, Options(max_shard_size=40_000))
    outcome = conversion.carry_out(Join(), jobs=2)
    assert outcome.result is not None
    assert outcome.shards == sum(name.endswith(".safetensors") for name in local)
    assert objects(OUT) == local


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("kept", ["object lock"], indirect=True)
def test_a_locked_bucket_without_checksums_is_refused_with_the_setting_that_sends_them(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CHECKSUM_ALGORITHM")
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", OUT, "--json")
    error = json.loads(out)
    assert (code, error["error"]) == (5, "The bucket requires checksums for uploads, as object lock does")
    assert "AWS_CHECKSUM_ALGORITHM=SHA256" in error["hint"]
    assert objects(OUT) == {}
