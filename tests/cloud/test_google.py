"""Google's object store, as a server written from the documentation of its XML API has it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.google_store import GoogleStore, google_store
from support.lease_steps import check_takeover
from support.program import snapshot
from support.s3 import objects, publish

import quarkconv
from quarkconv.cloud import objects as cloud_objects
from quarkconv.cloud.objects import Objects
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.write import executor, joining
from quarkconv.write.modes import Join

URL, OUT = "gs://models/org/tiny-moe", "gs://models/out/tiny-moe"
SHARD_SIZE = 40_000


@pytest.fixture
def google(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleStore]:
    """The server with the model; shards have several parts."""
    monkeypatch.setattr(cloud_objects, "PART_BYTES", 8192)
    monkeypatch.setattr(executor, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(joining, "POLL_SECONDS", 0.1)
    with google_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        publish(model, URL)
        yield store


@pytest.fixture
def local(model: Path, tmp_path: Path) -> dict[str, str]:
    """The output as a directory has it."""
    out = tmp_path / "local"
    return snapshot(quarkconv.convert_checkpoint(model, "fused-int8", out, max_shard_size=SHARD_SIZE).output)


def test_the_objects_have_the_bytes_of_a_directory(google: GoogleStore, local: dict[str, str]) -> None:
    quarkconv.convert_checkpoint(URL, "fused-int8", OUT, max_shard_size=SHARD_SIZE)
    assert objects(OUT) == local
    assert google.parts > 2 * sum(name.endswith(".safetensors") for name in local)
    assert not any(google.uploads.values())
    assert quarkconv.verify_checkpoint(OUT, URL, "cpu", stages=["bytes"]).ok
    quarkconv.convert_checkpoint(URL, "fused-int8", OUT, max_shard_size=SHARD_SIZE, overwrite=True)
    assert objects(OUT) == local


@pytest.mark.usefixtures("google")
def test_a_lease_is_replaced_under_its_generation() -> None:
    check_takeover(OUT)


@pytest.mark.usefixtures("google")
def test_workers_share_a_conversion(local: dict[str, str]) -> None:
    def work(_: int) -> int:
        conversion = Conversion.prepare(URL, "fused-int8", OUT, Options(max_shard_size=SHARD_SIZE))
        return conversion.carry_out(Join(), jobs=2).shards

    with ThreadPoolExecutor(2) as pool:
        written = sum(pool.map(work, range(2)))
    assert objects(OUT) == local
    assert written == sum(name.endswith(".safetensors") for name in local)


@pytest.mark.usefixtures("google")
def test_objects_are_deleted_though_some_are_gone_already() -> None:
    found = Objects(OUT)
    names = [f"{number}.json" for number in range(40)]
    for name in names[1::2]:
        found.put(name, b"{}")
    found.delete(names)
    assert found.entries() == {}
