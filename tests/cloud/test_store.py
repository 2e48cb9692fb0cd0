"""Conversions against Ceph's S3 server, with real part sizes. Run by ``make test-cloud`` through ``radosgw.sh``."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.faulty_proxy import FaultyProxy, faulty_proxy
from support.program import PROCESS_TIMEOUT, snapshot
from support.s3 import OUT, URL, objects, publish

import quarkconv
from quarkconv.cloud.objects import Objects
from quarkconv.cloud.uploads import list_uploads
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.convert.results import Outcome
from quarkconv.errors import SourceError
from quarkconv.write import joining
from quarkconv.write.modes import Join

SERVER = os.environ.get("RADOSGW", "")
SHARD_SIZE = 24_000_000

pytestmark = pytest.mark.skipif(not SERVER, reason="no radosgw: make test-cloud starts one")


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose shards have several parts of 8 MiB."""
    folder = tmp_path_factory.mktemp("store") / "model"
    return make_checkpoint(folder, layers=2, experts=16, hidden=1024, intermediate=768, zero_points=True, shards=4)


@pytest.fixture(scope="module")
def local(big_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("local") / "out"
    return snapshot(quarkconv.convert_checkpoint(big_model, "fused-int8", out, max_shard_size=SHARD_SIZE).output)


@pytest.fixture
def store(big_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The server behind a proxy, with the model and without an output."""
    import boto3

    with closing(boto3.client("s3", endpoint_url=SERVER, region_name="us-east-1")) as client:
        client.create_bucket(Bucket="models")
    with faulty_proxy(SERVER) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        if not Objects(URL).entries():
            publish(big_model)
        everything = Objects(OUT)
        everything.delete(list(everything.entries()))
        proxy.requests.clear()
        yield proxy


def convert(**options: object) -> None:
    quarkconv.convert_checkpoint(URL, "fused-int8", OUT, max_shard_size=SHARD_SIZE, **options)  # type: ignore[arg-type]


def test_multipart_uploads_have_the_bytes_of_a_directory(store: FaultyProxy, local: dict[str, str]) -> None:
    convert()
    assert objects() == local
    assert list_uploads(OUT) == []
    assert sum("partNumber=" in path for _, path in store.requests) > 8
    verified = quarkconv.verify_checkpoint(OUT, URL, "cpu", stages=["bytes"])
    assert verified.ok
    assert verified.bytes.against_source


@pytest.mark.parametrize(
    ("faults", "status"),
    [
        ({"refuse_puts": 5, "refuse": 5}, 503),
        ({"refuse_puts": 5, "refuse": 5}, 429),
        ({"reset_puts": 3, "cut": 5}, 503),
        ({"slow": 0.05}, 503),
    ],
)
def test_a_bad_network_costs_time_only(
    store: FaultyProxy, local: dict[str, str], faults: dict[str, float], status: int
) -> None:
    store.status = status
    for name, value in faults.items():
        setattr(store, name, value)
    convert()
    assert objects() == local
    assert list_uploads(OUT) == []


def test_bytes_of_another_range_never_reach_the_output(store: FaultyProxy) -> None:
    plan = quarkconv.plan_conversion(URL, "fused-int8", max_shard_size=SHARD_SIZE)
    assert plan.shards
    store.lie = True
    with pytest.raises(SourceError):
        convert()
    assert not [name for name in objects() if name.endswith((".safetensors", "config.json"))]


def test_a_conversion_that_is_killed_resumes_and_leaves_nothing(store: FaultyProxy, local: dict[str, str]) -> None:
    store.slow = 0.03
    rng, killed = random.Random(2), 0
    words = ["convert", URL, "--to", "fused-int8", "--out", OUT, "--max-shard-size", str(SHARD_SIZE), "--jobs", "2"]
    code = "import sys; from quarkconv.cli.main import main; main(sys.argv[1:])"
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE)
        if attempt < 6:
            time.sleep(rng.uniform(1, 3))
            process.send_signal(signal.SIGKILL)
            killed += 1
        errors = process.communicate(timeout=PROCESS_TIMEOUT)[1].decode()
        if "config.json" in objects() and ".quarkconv/plan.json" not in objects():
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert killed
    assert {name: found for name, found in objects().items() if not name.startswith(".quarkconv/")} == local
    assert list_uploads(OUT) == []


def test_workers_share_a_conversion_by_leases(
    store: FaultyProxy, local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "POLL_SECONDS", 0.2)
    store.lose_puts = 2

    def work(_: int) -> Outcome:
        options = Options(max_shard_size=SHARD_SIZE)
        return Conversion.prepare(URL, "fused-int8", OUT, options).carry_out(Join(), jobs=1)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    assert objects() == local
    assert sum(outcome.shards for outcome in results) == sum(name.endswith(".safetensors") for name in local)


@pytest.mark.parametrize("locked", [False, True])
def test_buckets_that_keep_versions_hold_the_bytes_of_a_directory(
    store: FaultyProxy, local: dict[str, str], monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    import boto3

    bucket = f"kept-{locked}".lower()
    with closing(boto3.client("s3", endpoint_url=store.url, region_name="us-east-1")) as client:
        client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=locked)
        if locked:
            rule = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}}
            client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=rule)
            monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "SHA256")
        else:
            client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    out = f"s3://{bucket}/out"
    for overwrite in (False, True):
        quarkconv.convert_checkpoint(URL, "fused-int8", out, max_shard_size=SHARD_SIZE, overwrite=overwrite)
        assert objects(out) == local
    assert list_uploads(out) == []
