"""``convert --join``: workers that come and go share a conversion by leases."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from support.checkpoints import make_checkpoint
from support.conversions import SHARD_SIZE, SMALL_STEPS, assert_unfinished, start_slow
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start
from support.progress import FullDisk

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.errors import UnsupportedError, UsageError, WriteError
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.shares import ALL, Share
from quarkconv.write import joining, leases
from quarkconv.write.durable import write_durably
from quarkconv.write.executor import Run
from quarkconv.write.leases import DirectoryLeases, Leases
from quarkconv.write.locks import OutputBusyError
from quarkconv.write.modes import Finish, Join, Mode, Whole
from quarkconv.write.output_directory import OutputDirectory
from quarkconv.write.output_file import DirectWrites, OutputFile
from quarkconv.write.staging import Staging

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "POLL_SECONDS", 0.05)


def prepare(model: Path, out: Path, size: int = SHARD_SIZE) -> Conversion:
    return Conversion.prepare(model, "fused-int8", out, Options(max_shard_size=size))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_is_taken_once_and_taken_over_when_it_is_not_renewed(tmp_path: Path) -> None:
    clocks = [Clock(), Clock()]
    first, second = (Leases(DirectoryLeases(tmp_path), clock) for clock in clocks)
    assert first.take("shard")
    assert not second.take("shard")
    clocks[1].now += leases.LEASE_SECONDS - 1
    assert not second.take("shard")
    first.renew()  # whatever its clock shows
    clocks[1].now += leases.LEASE_SECONDS - 1
    assert not second.take("shard")
    clocks[1].now += leases.LEASE_SECONDS - 1
    assert not second.take("shard")
    clocks[1].now += 2
    assert second.take("shard")
    assert first.holds("shard"), "it has not looked yet"
    first.renew()
    assert not first.holds("shard")
    assert not first.take("shard")
    first.release("shard")
    assert second.holds("shard")
    second.release("shard")
    assert first.take("shard")
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["shard.0"]


def test_a_lease_whose_reply_nfs_lost_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def linking(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))  # of the same request, made again

    worker, other = (Leases(DirectoryLeases(tmp_path)) for _ in range(2))
    monkeypatch.setattr(os, "link", linking)
    assert worker.take("shard")
    worker.renew()
    assert worker.holds("shard")
    monkeypatch.setattr(os, "link", link)
    assert not other.take("shard")
    worker.release("shard")
    assert list((tmp_path / "leases").iterdir()) == []


def test_clocks_that_differ_or_jump_do_not_matter(tmp_path: Path) -> None:
    clocks = [Clock(), Clock()]
    clocks[1].now = -1e9
    first, second = (Leases(DirectoryLeases(tmp_path), clock) for clock in clocks)
    assert first.take("shard")
    clocks[0].now += 1e9
    first.renew()
    assert not second.take("shard")
    assert not second.take("shard")


def test_of_many_workers_one_takes_a_lease(tmp_path: Path) -> None:
    clock = Clock()
    workers = [Leases(DirectoryLeases(tmp_path), clock) for _ in range(8)]
    for _ in range(30):
        barrier = threading.Barrier(len(workers))

        def take(worker: Leases, barrier: threading.Barrier = barrier) -> bool:
            worker.take("shard")  # sees the lease
            barrier.wait()
            return worker.take("shard")

        clock.now += leases.LEASE_SECONDS + 1  # of the round before; nobody has seen it for that long yet
        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(lambda worker: worker.take("shard"), workers))
            clock.now += leases.LEASE_SECONDS + 1
            assert sum(pool.map(take, workers)) <= 1
        holders = [worker for worker in workers if worker.holds("shard")]
        for worker in holders:
            worker.renew()
        assert sum(worker.holds("shard") for worker in holders) == 1


Result = TypeVar("Result")


def run_workers(count: int, work: Callable[[int], Result]) -> list[Result]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_workers_give_the_bytes_of_one_machine_and_count_each_shard_once(
    model: Path, tmp_path: Path, whole: dict[str, str], count: int
) -> None:
    out = tmp_path / "out"
    results = run_workers(count, lambda _: prepare(model, out).carry_out(Join(), jobs=2))
    assert snapshot(out) == whole
    shards = sum(name.endswith(".safetensors") for name in whole)
    assert sum(outcome.shards for outcome in results) == shards
    assert any(outcome.result is not None for outcome in results)
    outcome = prepare(model, out).carry_out(Join())
    assert outcome.result is not None
    assert outcome.shards == 0


@pytest.mark.parametrize("mode", [Join(), Finish(), Share(1, 2), Whole()], ids=str)
@pytest.mark.parametrize("left", [(), ("lock",), ("lock", "notes")], ids=str)
def test_what_is_left_of_the_working_folder_as_another_worker_ends_is_no_conversion(
    model: Path, tmp_path: Path, whole: dict[str, str], left: tuple[str, ...], mode: Mode
) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Join())
    folder = out / ".quarkconv"
    folder.mkdir()
    for name in left:
        (folder / name).mkdir() if name == "notes" else (folder / name).touch()
    outcome = prepare(model, out).carry_out(mode)
    assert outcome.result is not None
    assert outcome.shards == 0
    assert not folder.exists()
    assert snapshot(out) == whole


def test_a_worker_that_begins_as_another_one_ends_finds_its_output(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begun = OutputDirectory.has_begun

    def has_begun(output: OutputDirectory) -> bool:
        result = begun(output)
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as other:  # finishes between the look and the beginning
                other.submit(lambda: prepare(model, out).carry_out(Join())).result()
        return result

    monkeypatch.setattr(OutputDirectory, "has_begun", has_begun)
    outcome = prepare(model, out).carry_out(Join())
    assert outcome.result is not None
    assert snapshot(out) == whole


def test_a_shard_of_a_worker_that_vanished_is_taken_over(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    out = tmp_path / "out"
    conversion = prepare(model, out)
    plan = conversion.outputs[0].plan
    (out / ".quarkconv").mkdir(parents=True)
    vanished = Leases(DirectoryLeases(out / ".quarkconv"))
    assert all(vanished.take(name) for name in ("checks", plan.shards[0].file, plan.shards[-1].file))
    outcome = conversion.carry_out(Join())
    assert outcome.result is not None
    assert outcome.shards == len(plan.shards)
    assert snapshot(out) == whole


def test_what_a_worker_left_of_a_shard_is_removed_and_what_others_are_writing_is_not(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    out = tmp_path / "out"
    conversion = prepare(model, out)
    shard = conversion.outputs[0].plan.shards[0]
    parts = out / ".quarkconv" / "parts"
    with pytest.raises(WriteError, match="disk is full"):
        conversion.carry_out(Join(), jobs=1, progress=FullDisk(1))
    assert list(parts.iterdir()) == []  # another worker, of another name, would not write there again
    vanished = Leases(DirectoryLeases(out / ".quarkconv"))
    assert vanished.take(shard.file)
    (parts / f"{shard.file}.dead").write_bytes(bytes(100))
    slow = OutputFile(parts / f"{shard.file}.slow", shard.nbytes, DirectWrites(), locked=True)
    left: set[str] = set()
    finish = Run.finish

    def finishing(run: Run) -> Manifest:
        left.update(path.name for path in parts.iterdir())
        return finish(run)

    monkeypatch.setattr(Run, "finish", finishing)
    assert conversion.carry_out(Join()).result is not None
    assert left == {f"{shard.file}.slow"}
    slow.close()
    assert snapshot(out) == whole


def test_a_shard_whose_note_could_not_be_written_is_removed_by_the_next_worker(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    parts = out / ".quarkconv" / "parts"
    finish = Run.finish

    def fail(path: Path, data: bytes, worker: str) -> None:
        if path.parent.name == "notes":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_durably(path, data, worker)

    with monkeypatch.context() as patch:
        patch.setattr("quarkconv.write.staging.write_durably", fail)
        with pytest.raises(WriteError, match="disk is full"):
            prepare(model, out).carry_out(Join(), jobs=1)
    assert len(list(parts.iterdir())) == 1
    left: list[Path] = []

    def finishing(run: Run) -> Manifest:
        left.extend(parts.iterdir())
        return finish(run)

    monkeypatch.setattr(Run, "finish", finishing)
    assert prepare(model, out).carry_out(Join()).result is not None
    assert left == []
    assert snapshot(out) == whole


def test_the_space_that_is_missing_does_not_count_what_other_workers_are_writing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    conversion = prepare(model, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    found = []
    for nbytes in (0, 50_000_000):
        parts = out / ".quarkconv" / "parts"
        if nbytes:
            (parts / "model-00001-of-00099.safetensors.other").write_bytes(bytes(nbytes))
        with pytest.raises(WriteError, match="disk is full") as caught:
            conversion.carry_out(Join(), jobs=1, progress=FullDisk(1))
        found.append(caught.value.found)
    assert found == ["1 GB"] * 2


def test_two_workers_may_write_the_same_note_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".quarkconv").mkdir()
    first, second = (Staging(tmp_path, "plan", worker=f".{name}") for name in ("first", "second"))
    replace = os.replace

    def between(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        second.record_checks(ALL)
        replace(source, target)

    monkeypatch.setattr(os, "replace", between)
    first.record_checks(ALL)
    assert first.checks_hold(ALL)


@pytest.mark.parametrize("call", ["open", "flock"])
def test_a_worker_that_begins_while_the_folder_is_removed_sees_that_the_conversion_is_finished(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "out"
    result = prepare(model, out).carry_out(Join()).result
    assert result is not None
    (out / ".quarkconv").mkdir()
    module = os if call == "open" else fcntl
    function = getattr(module, call)
    removed = threading.Event()

    def removing(*args: Any, **options: Any) -> Any:
        if call == "flock" or str(args[0]).endswith(".quarkconv/lock"):
            monkeypatch.setattr(module, call, function)
            shutil.rmtree(out / ".quarkconv")
            removed.set()
        return function(*args, **options)

    monkeypatch.setattr(module, call, removing)
    monkeypatch.setattr(OutputDirectory, "finished", lambda *_: result.manifest if removed.is_set() else None)
    assert prepare(model, out).carry_out(Join()).result is not None
    assert removed.is_set()
    assert snapshot(out) == whole


def test_a_worker_that_begins_while_another_one_finishes_has_nothing_to_do(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    outcomes = []
    publish = Staging.publish

    def publishing(destination: Staging, names: list[str], manifest: bytes) -> None:
        outcomes.append(prepare(model, out).carry_out(Join()))
        with pytest.raises(OutputBusyError):
            prepare(model, out, 9000).carry_out(Join())
        publish(destination, names, manifest)

    monkeypatch.setattr(Staging, "publish", publishing)
    assert prepare(model, out).carry_out(Join()).result is not None
    assert [(outcome.result, outcome.shards) for outcome in outcomes] == [(None, 0)]
    assert snapshot(out) == whole


def test_a_worker_that_lost_its_lease_does_not_count(
    model: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(Leases, "renew", lambda _: None)  # it hangs, as far as others can see
    out = tmp_path / "out"
    slow = threading.Event()
    wrote = Run.write_shards

    def write(run: Run, *args: object) -> None:
        if threading.current_thread().name.endswith("_0"):
            slow.wait(1.5)
        wrote(run, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "write_shards", write)
    results = run_workers(3, lambda _: prepare(model, out).carry_out(Join()))
    assert snapshot(out) == whole
    shards = sum(name.endswith(".safetensors") for name in whole)
    assert sum(outcome.shards for outcome in results) == shards


def test_checks_that_fail_stop_every_worker(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", experts=4, zero_points=True, shards=2)
    plan = quarkconv.plan_conversion(model, "fused-int8", max_shard_size=SHARD_SIZE)
    check = plan.checks[1].first
    with open(model / check.file, "r+b") as file:
        file.seek(check.start)
        file.write(b"\x01")
    out = tmp_path / "out"

    def work(_: int) -> str:
        with pytest.raises(UnsupportedError, match="zero point is not zero") as caught:
            prepare(model, out).carry_out(Join())
        return caught.value.message

    assert len(run_workers(2, work)) == 2
    assert_unfinished(out)


def test_parts_and_joining_workers_do_not_mix(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Share(1, 2))
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        prepare(model, out).carry_out(Join())
    assert caught.value.found == "number of parts 2, now chosen by --join"
    with pytest.raises(UsageError, match="unfinished conversion"):
        prepare(model, out, 9000).carry_out(Join())


@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_workers_that_are_killed_are_replaced(tmp_path: Path, delay_s: float) -> None:
    model = make_checkpoint(tmp_path / "model", layers=2, experts=8, hidden=256, intermediate=256, shards=2)
    size = 300_000
    whole = snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "whole", max_shard_size=size).output)
    out = tmp_path / "out"
    quick_leases = (
        "import quarkconv.write.leases, quarkconv.write.joining\n"
        "quarkconv.write.leases.LEASE_SECONDS = 1.0; quarkconv.write.joining.POLL_SECONDS = 0.1\n"
    )
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", out]
    words += ["--max-shard-size", str(size), "--join"]
    slow = start_slow("pwrite", *words, setup=quick_leases)
    other = start(quick_leases + SMALL_STEPS + "main(sys.argv[1:])", *words)
    time.sleep(delay_s)
    slow.send_signal(signal.SIGKILL)
    assert slow.wait(PROCESS_TIMEOUT) == -signal.SIGKILL
    slow.communicate()
    _, message = other.communicate(timeout=PROCESS_TIMEOUT)
    assert other.returncode == 0, message
    assert snapshot(out) == whole


def test_the_command_joins_a_conversion(model: Path, tmp_path: Path, capsys: Capture, whole: dict[str, str]) -> None:
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", tmp_path / "out"]
    words += ["--max-shard-size", str(SHARD_SIZE), "--join"]
    code, out, _ = run_cli(capsys, *words, "--json")
    value = json.loads(out)
    assert (code, value["finished"], value["joined"]["shards"]) == (0, True, value["shards"])
    assert snapshot(tmp_path / "out") == whole
    for other in (["--part", "1/2"], ["--finish"], ["--overwrite"], ["--push", "org/name"], ["--tp", "2"]):
        assert run_cli(capsys, *words, *other)[0] == 2
