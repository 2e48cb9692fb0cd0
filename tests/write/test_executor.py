"""Carrying out a plan: the same bytes always, nothing lost whatever happens, the source never touched."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from writing_support import (
    assert_same_tensors,
    edit_checkpoint,
    fused_int8,
    load,
    make_checkpoint,
    run_cli,
    snapshot,
    start,
)

import quarkconv
from quarkconv.api import run_plan
from quarkconv.errors import QuarkconvError, SourceError, UsageError, WriteError
from quarkconv.write import executor

STAGING = ".quarkconv"
SHARD = 4_500_000


def convert(source: Path, out: Path, **options: Any) -> Path:
    options = {"max_shard_size": SHARD, "jobs": 1, **options}
    return quarkconv.convert_checkpoint(source, "fused-int8", out, **options).output


def arguments(source: Path, out: Path, jobs: int = 1) -> list[str | Path]:
    """The command that does what :func:`convert` does."""
    sizes = ["--max-shard-size", str(SHARD), "--jobs", str(jobs)]
    return ["convert", source, "--to", "fused-int8", "--out", out, *sizes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 MB in 3 shards, with zero points to check, files to copy and a folder."""
    root = make_checkpoint(
        tmp_path_factory.mktemp("large") / "model", layers=5, experts=8, hidden=512, intermediate=384, family="w1",
        scale_dtype=torch.bfloat16, zero_points=True, shards=3,
    )  # fmt: skip
    (root / "tokenizer.json").write_text('{"größe": 1}\n')
    (root / "original").mkdir()
    (root / "original" / "params.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed conversion, whose tensors were compared with torch."""
    out = convert(source, tmp_path_factory.mktemp("reference") / "out")
    assert_same_tensors(load(out), fused_int8(source))
    assert len(list(out.glob("*.safetensors"))) >= 5
    assert not (out / STAGING).exists()
    return snapshot(out)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A few KB in 2 shards."""
    return make_checkpoint(tmp_path / "model", layers=2, zero_points=True)


def assert_unfinished(out: Path) -> None:
    """Nothing in a directory can be taken for a model."""
    assert not (out / "config.json").exists()
    with pytest.raises(SourceError) as caught:
        quarkconv.inspect_checkpoint(out)
    if (out / STAGING).exists():
        assert caught.value.code == "conversion-unfinished"
        assert "unfinished conversion" in caught.value.message
        assert "again" in (caught.value.hint or "")


# The same bytes


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_the_bytes_do_not_depend_on_jobs_or_place(
    source: Path, reference: dict[str, str], tmp_path: Path, jobs: int
) -> None:
    moved = tmp_path / "another place"
    shutil.copytree(source, moved)
    for file in moved.rglob("*"):
        os.utime(file, (1, 1))
    assert snapshot(convert(moved, tmp_path / "deep" / "out", jobs=jobs)) == reference


def test_the_output_holds_no_path_and_no_time(small: Path, tmp_path: Path) -> None:
    first = snapshot(convert(small, tmp_path / "first"))
    text = (tmp_path / "first" / "quarkconv.json").read_text()
    assert str(tmp_path) not in text
    assert "first" not in text
    time.sleep(0.01)
    assert snapshot(convert(small, tmp_path / "second")) == first


def test_a_piece_larger_than_the_buffer_is_written_in_parts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = snapshot(convert(small, tmp_path / "whole"))
    monkeypatch.setattr(executor, "BUFFER_BYTES", 7)
    assert snapshot(convert(small, tmp_path / "parts")) == expected


def test_writes_and_reads_that_do_less_than_asked_are_continued(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = snapshot(convert(small, tmp_path / "whole"))
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda descriptor, view: write(descriptor, view[:13]))
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: preadv(descriptor, [views[0][:11]], at))
    assert snapshot(convert(small, tmp_path / "parts")) == expected


def test_progress_adds_up_to_what_is_written(source: Path, tmp_path: Path) -> None:
    plan = quarkconv.plan_conversion(source, "fused-int8", max_shard_size=SHARD)
    done: list[int] = []
    run_plan(plan, source, tmp_path / "out", 2, progress=done.append)
    assert sum(done) == plan.output_bytes
    assert min(done) > 0


# The source


def test_the_source_is_never_written_to(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "model"
    shutil.copytree(source, mine)
    everything = [mine, *mine.rglob("*")]

    def state() -> list[tuple[int, ...]]:
        return [(item.st_mode, item.st_mtime_ns, item.st_ctime_ns, item.st_ino) for item in map(os.stat, everything)]

    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state()
    hashes = snapshot(mine)
    convert(mine, tmp_path / "out", jobs=2)
    assert snapshot(mine) == hashes
    assert state() == before
    assert sorted(mine.rglob("*")) == sorted(everything[1:])


@pytest.mark.parametrize("inside", ["", "sub", "sub/deeper", ".."])
def test_source_and_output_must_not_contain_one_another(small: Path, inside: str) -> None:
    before = snapshot(small.parent)
    with pytest.raises(UsageError, match="inside one another"):
        convert(small, small / inside)
    assert snapshot(small.parent) == before


def test_a_link_to_the_source_is_seen_through(small: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small)
    for out in (tmp_path / "link", tmp_path / "link" / "sub"):
        with pytest.raises(UsageError, match="inside one another"):
            convert(small, out)


def test_a_cache_of_links_to_blobs_is_followed(small: Path, tmp_path: Path) -> None:
    expected = snapshot(convert(small, tmp_path / "plain"))
    linked = tmp_path / "snapshots" / "abc"
    linked.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(small.iterdir())):
        shutil.copy(file, tmp_path / "blobs" / str(number))
        (linked / file.name).symlink_to(f"../../blobs/{number}")
    assert snapshot(convert(linked, tmp_path / "out")) == expected
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_source_that_changed_after_planning_is_refused(small: Path, tmp_path: Path) -> None:
    plan = quarkconv.plan_conversion(small, "fused-int8")
    file = small / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(SourceError, match="changed since the plan") as caught:
        run_plan(plan, small, tmp_path / "out")
    assert caught.value.file == str(file)
    assert not (tmp_path / "out").exists()
    file.unlink()
    with pytest.raises(SourceError) as caught:
        run_plan(plan, small, tmp_path / "out")
    assert caught.value.code == "shard-missing"


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_source_that_is_cut_while_it_is_read(
    source: Path, reference: dict[str, str], tmp_path: Path, jobs: int
) -> None:
    mine, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, mine)
    cut = mine / "model-00003-of-00003.safetensors"
    whole, modified = cut.read_bytes(), cut.stat().st_mtime_ns
    started = threading.Event()

    def cut_once(_: int) -> None:
        if not started.is_set():
            started.set()
            os.truncate(cut, 5000)

    with pytest.raises(SourceError, match="ended while it was read") as caught:
        convert(mine, out, jobs=jobs, progress=cut_once)
    assert caught.value.exit_code == 3
    assert caught.value.file == str(cut)
    assert caught.value.tensor
    assert_unfinished(out)
    cut.write_bytes(whole)
    with pytest.raises(UsageError, match="begun with something else") as refused:  # it was written to: is it the same?
        convert(mine, out)
    assert refused.value.found == "the source's files have changed since"
    os.utime(cut, ns=(modified, modified))
    assert snapshot(convert(mine, out)) == reference


# What is copied


def test_other_files_are_copied_and_other_copies_of_the_weights_are_not(small: Path, tmp_path: Path) -> None:
    copied = {
        "tokenizer.json": b"{}", "README.md": b"# model\n", "chat_template.jinja": b"", "modeling_x.py": b"raise 1",
        "sub/folder/notes.txt": bytes(range(256)), "sub/vocab.txt": b"a\nb\n",
        # names that the working folder could use itself
        "plan.json": b"{}", "lock": b"x", "model-00001-of-00001.safetensors.json": b"{}", "a.part": b"x",
        "files/plan.json": b"1", "notes/x": b"y", "config.json.part": b"z", "quarkconv.json.part": b"z",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }  # fmt: skip
    left = (
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.00.pth", "flax_model.msgpack",
        "tf_model.h5", "onnx/model.onnx", "original/consolidated.safetensors", ".cache/huggingface/x",
        "old.ckpt", "optimizer.pt",
    )  # fmt: skip
    for name, data in {**copied, **dict.fromkeys(left, b"w")}.items():
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).write_bytes(data)
    out = convert(small, tmp_path / "out")
    own = {path.name for path in out.glob("*.safetensors")}
    own |= {"config.json", "model.safetensors.index.json", "quarkconv.json"}
    assert set(snapshot(out)) - own == set(copied)
    assert {name: (out / name).read_bytes() for name in copied} == copied


def test_generated_files_of_an_earlier_conversion_are_not_copied(small: Path, tmp_path: Path) -> None:
    first = convert(small, tmp_path / "first")
    second = convert(first, tmp_path / "second")
    manifest = json.loads((second / "quarkconv.json").read_text())
    assert manifest["sources"] == [[path.name, path.stat().st_size] for path in sorted(first.glob("*.safetensors"))]


# Killed

KILLED = """
import os, signal, sys
from quarkconv.cli.main import main
import quarkconv.write.executor
limit, calls = int(sys.argv[1]), 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for name in ("write", "fsync", "replace", "mkdir", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
try:
    main(sys.argv[2:])
finally:
    print(calls)
"""
"""Kills itself just before the given call that changes the disk."""


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    process = start(KILLED, 0, *arguments(source, tmp_path / "counting"))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    total = int(text.split()[-1])
    assert total > 300
    # The last 40 calls move the files up and remove the working folder.
    moments = [2, 3, 4, *random.Random(7).sample(range(5, total - 40), 5), *range(total - 40, total + 1, 4)]
    states = set()
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        process = start(KILLED, moment, *arguments(source, out))
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, moment
        if (out / "config.json").exists():  # moved last: everything else is in place
            states.add("complete")
            assert {name: digest for name, digest in snapshot(out).items() if not name.startswith(STAGING)} == reference
        else:
            states.add("unfinished")
            assert_unfinished(out)
        finished = {path.name: path.stat().st_ino for path in (out / STAGING / "files").glob("*.safetensors")}
        states.add(min(len(finished), 2))
        convert(source, out)
        assert snapshot(out) == reference, moment
        for name, inode in finished.items():  # what was finished was not written again
            assert (out / name).stat().st_ino == inode
        shutil.rmtree(out)
    assert states == {"unfinished", "complete", 0, 1, 2}


def test_killed_again_and_again_the_work_still_ends(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for moment in (60, 90, 120, 30):
        process = start(KILLED, moment, *arguments(source, out, jobs=2))
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert_unfinished(out)
    convert(source, out)
    assert snapshot(out) == reference


def test_killed_while_it_moves_files_up_overwrite_starts_anew(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(KILLED, 0, *arguments(source, tmp_path / "counting"))
    total = int(process.communicate(timeout=60)[0].split()[-1])
    for moment in (total - 33, total - 22, total - 11):
        process = start(KILLED, moment, *arguments(source, out))
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        convert(source, out, overwrite=True)
        assert snapshot(out) == reference
        shutil.rmtree(out)


def test_inspect_exits_3_on_unfinished_work_and_says_how_to_resume(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = start(KILLED, 80, *arguments(source, out))
    process.communicate(timeout=60)
    code, text, err = run_cli(capsys, "inspect", out, "--json")
    assert code == 3
    assert json.loads(text)["exit_code"] == 3
    assert "unfinished conversion" in err
    assert "run the same `quarkconv convert` command again" in err
    code, _, err = run_cli(capsys, *arguments(out, tmp_path / "next"))
    assert code == 3
    assert "unfinished" in err


def test_a_damaged_note_or_shard_is_written_again(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(KILLED, 250, *arguments(source, out))
    process.communicate(timeout=60)
    files = sorted((out / STAGING / "files").glob("*.safetensors"))
    assert len(files) >= 3
    os.truncate(files[0], files[0].stat().st_size - 1)
    (out / STAGING / "notes" / f"{files[1].name}.json").write_text("{")
    (out / STAGING / "notes" / f"{files[2].name}.json").unlink()
    convert(source, out)
    assert snapshot(out) == reference


# Interrupted

SLOW = """
import os, signal, sys, time
from quarkconv.cli.main import main
import quarkconv.write.executor
name, calls = sys.argv[1], 0
fast = getattr(os, name)

def slow(*args):
    global calls
    calls += 1
    if calls == 5:
        print("working", file=sys.stderr, flush=True)
    time.sleep(0.02 if calls < 5 else 0.1)
    return fast(*args)

setattr(os, name, slow)
signal.signal(signal.SIGINT, signal.default_int_handler)
main(sys.argv[2:])
"""
"""Takes its time for one kind of call, and says when it is at work."""


def start_slow(name: str, *args: str | Path) -> subprocess.Popen[str]:
    process = start(SLOW, name, *args)
    assert process.stderr is not None
    assert process.stderr.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupt_stops_soon_and_the_work_resumes(
    source: Path, reference: dict[str, str], tmp_path: Path, number: signal.Signals, jobs: int
) -> None:
    out = tmp_path / "out"
    process = start_slow("write", *arguments(source, out, jobs))
    began = time.monotonic()
    process.send_signal(number)
    text, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 3  # of half a minute; it takes a fraction of a second
    assert process.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert text == ""
    assert_unfinished(out)
    assert snapshot(convert(source, out)) == reference


def test_an_interrupt_before_anything_is_written_is_told_as_well(source: Path, tmp_path: Path) -> None:
    process = start_slow("preadv", *arguments(source, tmp_path / "out"), "--json")  # zero points are being read
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(text)["exit_code"] == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


# Errors of writing


class Failing:
    """os.write that fails after a number of calls."""

    def __init__(self, number: int, after: int) -> None:
        self.error = OSError(number, os.strerror(number))
        self.left = after
        self.write = os.write

    def __call__(self, descriptor: int, data: memoryview) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.write(descriptor, data)


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EIO, "Writing failed")])
@pytest.mark.parametrize("after", [0, 1, 100])
def test_a_failing_write_is_one_message_and_the_work_resumes(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int, words: str, after: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", Failing(number, after))
        code, text, err = run_cli(capsys, *arguments(source, out))
    assert code == 5
    assert text == ""
    assert err.count("error:") == 1
    assert words in err
    assert "Traceback" not in err
    assert "same command again" in err
    assert_unfinished(out)
    assert snapshot(convert(source, out)) == reference


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_other_calls_that_fail_are_errors_of_writing_too(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    out = tmp_path / "out"
    failures = 0
    for after in range(0, 100, 4):
        calls = iter(range(10**6))
        original: Callable[..., Any] = getattr(os, operation)

        def failing(*args: Any, original: Any = original, calls: Iterator[int] = calls, after: int = after) -> Any:
            if next(calls) >= after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, operation, failing)
            try:
                convert(source, out)
            except WriteError:
                failures += 1
            else:
                break
        if not (out / "config.json").exists():
            assert_unfinished(out)
    assert failures > 2
    assert snapshot(out) == reference


def test_the_error_is_told_and_not_that_the_other_workers_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed, first = os.write, threading.Event(), []

    def fail_in_the_second_worker(descriptor: int, data: memoryview) -> int:
        worker = threading.current_thread().name
        if not first:
            first.append(worker)
        if worker != first[0]:
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        failed.wait(10)
        time.sleep(0.05)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fail_in_the_second_worker)
    with pytest.raises(WriteError, match="no space left"):
        convert(source, tmp_path / "out", jobs=2)
    assert failed.is_set()


def test_space_is_checked_before_the_first_byte(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
        with pytest.raises(WriteError, match="not enough space") as caught:
            convert(source, out)
    assert caught.value.found == "0.0 GB free"
    assert not list(out.rglob("*.safetensors*"))
    assert_unfinished(out)
    assert snapshot(convert(source, out)) == reference


def test_a_real_limit_on_file_sizes_exits_5_and_resumes(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1));"
        "from quarkconv.cli.main import main; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    process = start(limited, *arguments(source, out, jobs=2))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "File too large" in err
    assert "Traceback" not in err
    assert_unfinished(out)
    assert snapshot(convert(source, out)) == reference


def test_an_output_that_is_a_file_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(QuarkconvError) as caught:
        convert(small, tmp_path / "out")
    assert caught.value.exit_code in (2, 5)
    assert (tmp_path / "out").read_text() == "mine"


# Other work in the output directory


def interrupt(source: Path, out: Path) -> None:
    """Leave unfinished work with some shards done."""
    calls = iter(range(10**6))

    def stop(_: int) -> None:
        if next(calls) == 150:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError):
        convert(source, out, progress=stop)
    assert list((out / STAGING / "files").glob("*.safetensors"))


def test_unfinished_work_with_other_options_is_refused_and_kept(
    source: Path, reference: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    before = snapshot(out)
    code, _, err = run_cli(capsys, "convert", source, "--to", "fused-int8", "--out", out, "--max-shard-size", "6MB")
    assert code == 2
    assert "begun with something else" in err
    assert "another source, target or shard size" in err
    assert "--overwrite" in err
    assert snapshot(out) == before
    assert snapshot(convert(source, out)) == reference


def test_unfinished_work_of_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))
    with pytest.raises(UsageError, match="another source"):
        convert(other, out)
    assert snapshot(convert(other, out, overwrite=True)) != {}
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 12345.0
    assert_same_tensors(load(out), fused_int8(other))


@pytest.mark.parametrize("unfinished", [False, True])
def test_overwrite_starts_anew(source: Path, reference: dict[str, str], tmp_path: Path, unfinished: bool) -> None:
    out = tmp_path / "out"
    if unfinished:
        interrupt(source, out)
    else:
        convert(source, out, max_shard_size=10**6)
        assert len(list(out.glob("*.safetensors"))) > 10
        with pytest.raises(UsageError, match="not empty") as caught:
            convert(source, out)
        assert "--overwrite" in (caught.value.hint or "")
    assert snapshot(convert(source, out, overwrite=True)) == reference


def test_overwrite_deletes_only_what_was_written(small: Path, tmp_path: Path) -> None:
    (small / "sub").mkdir()
    (small / "sub" / "vocab.txt").write_text("a")
    out = convert(small, tmp_path / "out")
    for foreign in (out / "sub" / "mine.txt", out / "notes.txt"):
        foreign.write_text("mine")
        before = snapshot(out)
        with pytest.raises(UsageError, match="not empty") as caught:
            convert(small, out, overwrite=True)
        assert caught.value.found == foreign.relative_to(out).as_posix()
        assert snapshot(out) == before  # refused before anything was deleted
        foreign.unlink()
    convert(small, out, overwrite=True)
    assert_same_tensors(load(out), fused_int8(small))


def test_overwrite_of_a_model_that_quarkconv_did_not_write_is_refused(small: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=5)
    before = snapshot(other)
    with pytest.raises(UsageError, match="not empty"):
        convert(small, other, overwrite=True)
    with pytest.raises(UsageError, match="not empty"):
        convert(small, other)
    assert snapshot(other) == before
    assert not (other / STAGING).exists()


def test_overwrite_with_a_manifest_that_cannot_be_read_deletes_nothing(small: Path, tmp_path: Path) -> None:
    out = convert(small, tmp_path / "out")
    text = (out / "quarkconv.json").read_text()
    (out / "quarkconv.json").write_text(text.replace("model-00001-of", "../../model-00001-of"))
    before = snapshot(out)
    with pytest.raises(UsageError, match="manifest"):
        convert(small, out, overwrite=True)
    assert snapshot(out) == before


def test_a_finished_conversion_is_not_touched_without_overwrite(small: Path, tmp_path: Path) -> None:
    out = convert(small, tmp_path / "out")
    before = snapshot(out)
    with pytest.raises(UsageError, match="not empty"):
        convert(small, out)
    assert snapshot(out) == before


def test_an_empty_directory_is_used(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (convert(small, tmp_path / "out") / "config.json").exists()


def test_leftover_notes_of_another_plan_are_ignored(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """The folder of a finished conversion may be half removed: its notes there, its plan gone."""
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(source, other)
    (other / "extra.txt").write_text("another plan")
    edit_checkpoint(other, lambda tensors: tensors.update({"lm_head.weight": -tensors["lm_head.weight"]}))
    interrupt(other, out)
    (out / STAGING / "plan.json").unlink()
    assert snapshot(convert(source, out)) == reference


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once_the_second_names_the_first(
    source: Path, reference: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: bool
) -> None:
    out = tmp_path / "out"
    first = start_slow("write", *arguments(source, out))
    code, _, err = run_cli(capsys, *arguments(source, out), *(["--overwrite"] if overwrite else []))
    assert code == 5
    assert "Another process" in err
    assert f"process {first.pid}" in err
    assert first.poll() is None
    first.kill()  # its lock is gone with it
    first.communicate(timeout=30)
    assert snapshot(convert(source, out)) == reference


# Memory

PEAK = """
import sys
from quarkconv.api import convert_checkpoint
convert_checkpoint(sys.argv[1], "fused-int8", sys.argv[2], jobs=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (2, 8):
        model = make_checkpoint(tmp_path / f"model-{layers}", layers=layers, experts=8, hidden=768, intermediate=384)
        sizes.append(sum(file.stat().st_size for file in model.glob("*.safetensors")))
        process = start(PEAK, model, tmp_path / f"out-{layers}")
        text, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        peaks.append(int(text) * 1024)
        with safe_open(tmp_path / f"out-{layers}" / "model-00001-of-00001.safetensors", "pt") as handle:
            assert handle.get_slice("model.layers.1.mlp.experts.gate_up_proj").get_shape() == [8, 768, 768]
    assert sizes[1] - sizes[0] > 50e6
    assert peaks[1] - peaks[0] < 5e6  # a tenth of what the model grew by: headers and the manifest
    assert peaks[1] < 160e6
