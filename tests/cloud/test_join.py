"""``convert --join`` into an object store: leases are objects that are written on condition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.bucket_outputs import prepare
from support.faulty_proxy import FaultyProxy
from support.lease_steps import check_takeover
from support.program import snapshot
from support.progress import Recorder, Stop
from support.s3 import OUT, URL, objects

import quarkconv
from quarkconv.cloud.objects import ConditionsUnsupportedError, Objects
from quarkconv.cloud.uploads import list_uploads
from quarkconv.write import joining, leases
from quarkconv.write.leases import Leases
from quarkconv.write.modes import Join
from quarkconv.write.object_leases import ObjectLeases

pytestmark = pytest.mark.long(10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "POLL_SECONDS", 0.1)


@pytest.mark.usefixtures("proxy")
def test_a_lease_is_taken_once_and_taken_over_when_it_is_not_renewed() -> None:
    check_takeover(OUT).release("shard")
    assert objects() == {}


def test_a_response_that_is_lost_does_not_lose_the_lease(proxy: FaultyProxy) -> None:
    worker, other = (Leases(ObjectLeases(Objects(OUT))) for _ in range(2))
    proxy.lose_puts = 1
    assert worker.take("shard")
    assert proxy.lose_puts == 0
    assert not other.take("shard")
    proxy.lose_puts = 1
    worker.renew()
    assert worker.holds("shard")


@pytest.mark.parametrize("count", [1, 3])
def test_workers_give_the_objects_of_one_process_and_count_each_shard_once(
    published: FaultyProxy, model: Path, tmp_path: Path, count: int
) -> None:
    local = snapshot(
        quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local", max_shard_size=40_000).output
    )
    published.slow = 0.01
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda _: prepare(URL).carry_out(Join(), jobs=2), range(count)))
    assert objects() == local
    assert list_uploads(OUT) == []
    assert all(outcome.result is not None for outcome in results)
    shards = sum(name.endswith(".safetensors") for name in local)
    assert sum(outcome.shards for outcome in results) == shards


@pytest.mark.usefixtures("published")
def test_shards_and_the_end_of_a_worker_that_vanished_are_taken_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    local = snapshot(
        quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local", max_shard_size=40_000).output
    )
    vanished = Leases(ObjectLeases(Objects(OUT)))
    shards = sorted(name for name in local if name.endswith(".safetensors"))
    assert all(vanished.take(name) for name in ("checks", "finish", shards[0], shards[-1]))
    outcome = prepare(model).carry_out(Join(), jobs=2)
    assert outcome.result is not None
    assert outcome.shards == len(shards)
    assert objects() == local


def test_shards_of_others_are_counted_once_and_their_notes_read_once(
    published: FaultyProxy, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        prepare(URL).carry_out(Join(), jobs=1, progress=Stop(9))
    written = [name for name in objects() if name.startswith(".quarkconv/notes/")]
    assert written
    published.requests.clear()
    progress = Recorder()
    outcome = prepare(URL).carry_out(Join(), jobs=2, progress=progress)
    [step] = progress.named("Converting to fused-int8 with others")
    local = snapshot(
        quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local", max_shard_size=40_000).output
    )
    shards = [name for name in local if name.endswith(".safetensors")]
    assert outcome.shards == len(shards) - len(written)
    assert sum(step.advances) <= (step.total or 0)
    notes = [path for method, path in published.requests if method == "GET" and "/notes/" in path]
    assert len(notes) == len(set(notes)) == len(shards)
    assert objects() == local


@pytest.mark.usefixtures("published")
def test_a_worker_that_looked_before_the_others_finished_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = snapshot(
        quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local", max_shard_size=40_000).output
    )
    take, overtaken = Leases.take, list[bool]()

    def overtake(self: Leases, name: str) -> bool:
        if name.endswith(".safetensors") and not overtaken:
            overtaken.append(True)
            assert prepare(model).carry_out(Join(), jobs=1).result is not None
        return take(self, name)

    monkeypatch.setattr(Leases, "take", overtake)
    outcome = prepare(model).carry_out(Join(), jobs=1)
    assert overtaken
    assert (outcome.result is not None, outcome.shards) == (True, 0)
    assert objects() == local


@pytest.mark.parametrize("how", ["ignore_conditions", "refuse_conditions"])
def test_stores_without_conditional_writes_are_refused_and_parts_are_not(
    published: FaultyProxy, model: Path, how: str
) -> None:
    setattr(published, how, True)
    with pytest.raises(ConditionsUnsupportedError, match="no conditional writes") as caught:
        prepare(model).carry_out(Join())
    assert "--part" in (caught.value.hint or "")
    assert not [name for name in objects() if name.endswith(".safetensors")]
    Objects(OUT).delete(list(objects()))
    prepare(model).carry_out()
    assert "config.json" in objects()
