"""``convert --part``: workers with one output directory write the bytes of one machine."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import make_checkpoint
from support.conversions import SHARD_SIZE, SMALL_STEPS, assert_unfinished, start_slow
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.errors import UnsupportedError, UsageError, WriteError
from quarkconv.plan.pieces import Copy, OutputShard, OutputTensor
from quarkconv.plan.shares import MAX_SHARES, Share, parse_share
from quarkconv.write.locks import OutputBusyError
from quarkconv.write.modes import Finish
from quarkconv.write.output_directory import OutputDirectory

Capture = pytest.CaptureFixture[str]


def prepare(model: Path, out: Path, **options: Any) -> Conversion:
    return Conversion.prepare(model, "fused-int8", out, Options(**{"max_shard_size": SHARD_SIZE, **options}))


def shards(sizes: list[int]) -> tuple[OutputShard, ...]:
    return tuple(
        OutputShard(f"{number:05d}", 0, (OutputTensor("t", "I8", (size,), (Copy("t", "f", 0, size),)),))
        for number, size in enumerate(sizes)
    )


@given(st.lists(st.integers(0, 10**6), max_size=40), st.integers(1, 12))
def test_every_shard_is_dealt_once_and_no_share_is_much_larger(sizes: list[int], count: int) -> None:
    dealt = [Share(number, count).shards(shards(sizes)) for number in range(1, count + 1)]
    assert sorted(shard.file for share in dealt for shard in share) == [shard.file for shard in shards(sizes)]
    loads = [sum(shard.nbytes for shard in share) for share in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(st.integers(0, 50), st.integers(1, 12))
def test_every_check_is_dealt_once(checks: int, count: int) -> None:
    numbers: Any = tuple(range(checks))
    dealt: list[Any] = [number for share in range(1, count + 1) for number in Share(share, count).checks(numbers)]
    assert sorted(dealt) == list(range(checks))


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "-1/4", "1/0", f"1/{MAX_SHARES + 1}", "1/4/2", "a/b", "٣/٨"])
def test_parts_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Invalid --part"):
        parse_share(text)


@pytest.mark.parametrize(("number", "count"), [(0, 3), (4, 3), (1, 0), (1, MAX_SHARES + 1)])
def test_no_share_is_outside_of_the_shares(number: int, count: int) -> None:
    with pytest.raises(UsageError, match="Invalid --part"):
        quarkconv.Share(number, count)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_parts_give_the_bytes_of_one_machine(model: Path, tmp_path: Path, whole: dict[str, str], count: int) -> None:
    out = tmp_path / "out"
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    for number in order:
        result = prepare(model, out).carry_out(Share(number, count), jobs=2).result
        if result is None:
            assert_unfinished(out)
        else:  # of more parts than shards, some are empty, and the others need not wait for them
            assert number == order[-1] or count > len(result.plan.shards)
    assert result is not None
    assert snapshot(out) == whole
    assert not (out / ".quarkconv").exists()


def test_parts_at_the_same_time_give_the_bytes_of_one_machine(
    model: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    def run(out: Path, number: int) -> object:
        return prepare(model, out).carry_out(Share(number, 4)).result

    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(run, [out] * 4, range(1, 5)))
        assert any(result is not None for result in results), "no process finished"
        assert snapshot(out) == whole


def test_a_finished_part_is_not_written_again(model: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Share(1, 2))
    before = {path: path.stat().st_mtime_ns for path in (out / ".quarkconv" / "files").iterdir()}
    assert before
    prepare(model, out).carry_out(Share(1, 2))
    assert {path: path.stat().st_mtime_ns for path in (out / ".quarkconv" / "files").iterdir()} == before
    assert prepare(model, out).carry_out(Share(2, 2)).result is not None
    again = prepare(model, out).carry_out(Share(2, 2)).result  # of a finished conversion
    assert again is not None
    assert snapshot(out) == whole
    assert not (out / ".quarkconv").exists()


def test_finish_names_the_parts_that_are_missing(model: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no unfinished conversion"):
        prepare(model, out).carry_out(Finish())
    assert not out.exists()
    for number in (1, 3):
        prepare(model, out).carry_out(Share(number, 3))
    with pytest.raises(WriteError, match="missing") as caught:
        prepare(model, out).carry_out(Finish())
    assert caught.value.found == "2 finished"
    assert caught.value.hint == "run --part 2/3 again"
    assert_unfinished(out)
    prepare(model, out).carry_out(Share(2, 3))
    assert prepare(model, out).carry_out(Finish()).result is not None
    assert snapshot(out) == whole


def test_a_note_that_does_not_fit_its_file_counts_as_missing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Share(1, 2))
    file = next((out / ".quarkconv" / "files").glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)
    assert prepare(model, out).carry_out(Share(2, 2)).result is None
    with pytest.raises(WriteError) as caught:
        prepare(model, out).carry_out(Finish())
    assert caught.value.hint == "run --part 1/2 again"


def test_a_whole_run_completes_what_parts_began(model: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Share(2, 3))
    prepare(model, out).carry_out()
    assert snapshot(out) == whole


@pytest.mark.parametrize(
    ("share", "options", "found"),
    [
        (Share(1, 4), {}, "number of parts 3, now 4"),
        (Share(1, 3), {"max_shard_size": 9000}, "largest shard size 6000, now 9000"),
    ],
)
def test_parts_of_another_conversion_are_refused(
    model: Path, tmp_path: Path, share: Share, options: dict[str, Any], found: str
) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Share(2, 3))
    before = snapshot(out)
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        prepare(model, out, **options).carry_out(share)
    assert caught.value.found == found
    assert (caught.value.hint or "").endswith("delete the output to start over")  # --part excludes --overwrite
    after = snapshot(out)
    assert {name: after[name] for name in after if "share-" not in name} == {
        name: before[name] for name in before if "share-" not in name
    }


def test_a_directory_with_something_else_is_refused_and_left_as_it_is(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        prepare(model, out).carry_out(Share(1, 2))
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt"]


def test_a_check_that_fails_in_one_part_keeps_the_conversion_from_finishing(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", experts=4, zero_points=True, shards=2)
    plan = quarkconv.plan_conversion(model, "fused-int8", max_shard_size=SHARD_SIZE)
    check = plan.checks[1].first  # of the second of two shares
    with open(model / check.file, "r+b") as file:
        file.seek(check.start)
        file.write(b"\x01")
    out = tmp_path / "out"
    assert prepare(model, out).carry_out(Share(1, 2)).result is None
    with pytest.raises(UnsupportedError, match="zero point is not zero"):
        prepare(model, out).carry_out(Share(2, 2))
    assert_unfinished(out)


def test_a_part_is_written_by_one_process_at_a_time(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(model, out).carry_out(Share(1, 3))
    state = json.loads((out / ".quarkconv" / "plan.json").read_text())
    with OutputDirectory(out).join(state, [], Share(2, 3)):
        with pytest.raises(OutputBusyError):
            prepare(model, out).carry_out(Share(2, 3))
        with pytest.raises(WriteError, match="Another process"):
            prepare(model, out).carry_out()
        assert prepare(model, out).carry_out(Share(3, 3)).result is None


@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_parts_that_are_killed_resume(tmp_path: Path, delay_s: float) -> None:
    model = make_checkpoint(tmp_path / "model", layers=2, experts=8, hidden=256, intermediate=256, shards=2)
    size = 600_000
    whole = snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "whole", max_shard_size=size).output)
    out = tmp_path / "out"
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", out, "--max-shard-size", str(size)]
    slow = start_slow("pwrite", *words, "--part", "1/2")
    other = start(SMALL_STEPS + "main(sys.argv[1:])", *words, "--part", "2/2")
    time.sleep(delay_s)
    slow.send_signal(signal.SIGKILL)
    slow.communicate()
    assert slow.returncode == -signal.SIGKILL
    _, message = other.communicate(timeout=PROCESS_TIMEOUT)
    assert other.returncode == 0, message
    assert_unfinished(out)
    again = start(SMALL_STEPS + "main(sys.argv[1:])", *words, "--part", "1/2")
    _, message = again.communicate(timeout=PROCESS_TIMEOUT)
    assert again.returncode == 0, message
    assert snapshot(out) == whole


def test_the_command_converts_parts(model: Path, tmp_path: Path, capsys: Capture, whole: dict[str, str]) -> None:
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", tmp_path / "out"]
    words += ["--max-shard-size", str(SHARD_SIZE)]
    code, out, _ = run_cli(capsys, *words, "--part", "1/2", "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, planned["dry_run"], planned["finished"]) == (0, True, False)
    assert not (tmp_path / "out").exists()
    code, out, _ = run_cli(capsys, *words, "--part", "1/2", "--json")
    first = json.loads(out)
    assert code == 0
    assert (first["dry_run"], first["finished"], first["part"]) == (False, False, planned["part"])
    assert "plan" not in first
    code, out, _ = run_cli(capsys, *words, "--part", "2/2")
    assert code == 0
    assert "part" in out
    assert "Converted to fused-int8" in out
    assert snapshot(tmp_path / "out") == whole
    code, out, _ = run_cli(capsys, *words, "--finish", "--json")  # finished already
    assert (code, json.loads(out)["plan"]) == (0, json.loads((tmp_path / "out" / "quarkconv.json").read_text())["plan"])
    code, out, _ = run_cli(capsys, *words[:5], tmp_path / "other", *words[6:], "--part", "1/2")
    assert code == 0
    assert "Part 1 of 2 written" in out


@pytest.mark.parametrize(
    "options",
    [
        ["--part", "3/2"], ["--part", "1/2", "--finish"], ["--part", "1/2", "--overwrite"], ["--finish", "--dry-run"],
        ["--part", "1/2", "--tp", "2"], ["--finish", "--tp", "2"], ["--part", "1/2", "--push", "org/name"],
    ],
)  # fmt: skip
def test_options_that_exclude_one_another_are_refused(
    model: Path, tmp_path: Path, capsys: Capture, options: list[str]
) -> None:
    code, _, err = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", tmp_path / "out", *options)
    assert (code, err.count("error:")) == (2, 1), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "excluded"),
    [
        (["--part", "1/2", "--join"], "--part and --join"), (["--join", "--overwrite"], "--join and --overwrite"),
        (["--part", "1/2", "--push", "org/name"], "--part and --push"),
        (["--finish", "--dry-run"], "--finish and --dry-run"),
        (["--join", "--ray", "local", "--finish"], "--join and --ray and --finish"),
    ],
)  # fmt: skip
def test_the_options_that_exclude_one_another_are_named(
    model: Path, capsys: Capture, options: list[str], excluded: str
) -> None:
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", *options, "--json")
    assert (code, json.loads(out)["error"]) == (2, f"{excluded} exclude one another")
