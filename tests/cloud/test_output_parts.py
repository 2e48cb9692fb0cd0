"""Conversions to an object store in parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.bucket_outputs import prepare
from support.faulty_proxy import FaultyProxy
from support.progress import Recorder
from support.s3 import OUT, URL, objects

from quarkconv.cloud.objects import Objects
from quarkconv.errors import UsageError, WriteError
from quarkconv.plan.shares import Share
from quarkconv.write.modes import Finish, Join, Mode
from quarkconv.write.object_destination import ObjectDestination

pytestmark = pytest.mark.long(15)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("at_once", [True, False])
def test_parts_give_the_objects_of_one_process(model: Path, local: dict[str, str], at_once: bool) -> None:
    def run(number: int) -> object:
        return prepare(model).carry_out(Share(number, 3)).result

    if at_once:
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(run, range(1, 4)))
        assert any(result is not None for result in results)
    else:
        assert [run(number) is None for number in (3, 1)] == [True, True]
        with pytest.raises(WriteError, match="missing") as caught:
            prepare(model).carry_out(Finish())
        assert caught.value.hint == "run --part 2/3 again"
        assert run(2) is not None
        assert run(2) is not None  # of a finished conversion
    assert objects() == local


def test_only_the_part_that_finishes_reads_notes_and_no_source_is_checked_twice(
    published: FaultyProxy, local: dict[str, str]
) -> None:
    shards = sum(name.endswith(".safetensors") for name in local)
    for number, expected in ((1, 0), (2, 0), (3, shards)):
        published.requests.clear()
        progress = Recorder()
        prepare(URL).carry_out(Share(number, 3), jobs=2, progress=progress)
        assert sum(method == "GET" and "/notes/" in path for method, path in published.requests) == expected
        assert not [path for method, path in published.requests if method == "HEAD" and "/org/tiny-moe/" in path]
        [step] = progress.named(f"Converting part {number}/3 to fused-int8")
        assert sum(step.advances) == step.total
    assert objects() == local


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("owner", "method"), [(Objects, "get_many"), (ObjectDestination, "publish")])
def test_a_last_part_that_another_process_overtakes_sees_the_conversion_finished(
    model: Path, local: dict[str, str], monkeypatch: pytest.MonkeyPatch, owner: Any, method: str
) -> None:
    """The other one finishes before the notes of all shards are read here, or before the manifest is written here."""
    prepare(model).carry_out(Share(1, 2))
    shards = {name for name in local if name.endswith(".safetensors")}
    original = getattr(owner, method)
    overtaken: list[bool] = []

    def overtake(*arguments: Any) -> Any:
        if not overtaken and shards <= objects().keys():
            overtaken.append(True)
            assert prepare(model).carry_out(Finish()).result is not None
        return original(*arguments)

    monkeypatch.setattr(owner, method, overtake)
    assert prepare(model).carry_out(Share(2, 2)).result is not None
    assert overtaken
    assert objects() == local


@pytest.mark.usefixtures("published")
def test_finish_without_a_conversion_and_parts_of_another_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished conversion"):
        prepare(model).carry_out(Finish())
    prepare(model).carry_out(Share(1, 3))
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        prepare(model).carry_out(Share(1, 4))
    assert caught.value.found == "number of parts 3, now 4"
    with pytest.raises(UsageError) as caught:
        prepare(model, max_shard_size=50_000).carry_out(Share(2, 3))
    assert caught.value.found == "largest shard size 40000, now 50000"


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("mode", [Share(1, 2), Join(), Finish()], ids=str)
def test_an_output_that_is_being_deleted_is_not_finished(model: Path, mode: Mode) -> None:
    prepare(model).carry_out()
    Objects(OUT).delete(["config.json"])  # what --overwrite deletes first
    with pytest.raises(UsageError, match=r"other objects|no unfinished conversion"):
        prepare(model).carry_out(mode)
