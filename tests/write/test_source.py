"""The source: never written to, followed through links, and reported when it changes while it is read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.conversions import SHARD, arguments, assert_unfinished, convert, execute
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start
from support.progress import AfterAdvances, Bytes

import quarkconv
from quarkconv.errors import SourceError, UsageError

pytestmark = pytest.mark.long(30)


def test_the_source_is_never_written_to(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    everything = [model, *model.rglob("*")]

    def state() -> list[tuple[int, ...]]:
        return [(item.st_mode, item.st_mtime_ns, item.st_ctime_ns, item.st_ino) for item in map(os.stat, everything)]

    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state()
    hashes = snapshot(model)
    convert(model, tmp_path / "out", jobs=2)
    assert snapshot(model) == hashes
    assert state() == before
    assert sorted(model.rglob("*")) == sorted(everything[1:])


@pytest.mark.parametrize("inside", ["", "sub", "sub/deeper", ".."])
def test_source_and_output_must_not_contain_one_another(small: Path, inside: str) -> None:
    before = snapshot(small.parent)
    with pytest.raises(UsageError, match="contain one another"):
        convert(small, small / inside)
    assert snapshot(small.parent) == before


def test_a_link_to_the_source_is_seen_through(small: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small)
    for out in (tmp_path / "link", tmp_path / "link" / "sub"):
        with pytest.raises(UsageError, match="contain one another"):
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
    with pytest.raises(SourceError, match="changed during") as caught:
        execute(plan, small, tmp_path / "out", jobs=4)
    assert caught.value.file == str(file)
    assert not (tmp_path / "out").exists()
    file.unlink()
    with pytest.raises(SourceError) as caught:
        execute(plan, small, tmp_path / "out", jobs=4)
    assert caught.value.code == "shard-missing"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"experts.0.up_proj.weight_zero", b"experts.7.up_proj.weight_zero", "no such tensor in this file"),  # a check
        (b'experts.0.down_proj.weight"', b'experts.7.down_proj.weight"', "no such tensor in this file"),
        (b"model.layers.0.mlp.experts.0.gate_proj", b"model.layers.1.mlp.experts.0.gate_proj", "the tensor from"),
    ],
)
def test_a_plan_that_is_older_than_its_source_is_refused(
    small: Path, tmp_path: Path, old: bytes, new: bytes, found: str
) -> None:
    """The files are as long as they were, but other tensors lie in them."""
    plan = quarkconv.plan_conversion(small, "fused-int8")
    for file in small.glob("*.safetensors"):
        data = file.read_bytes()
        swapped = data.replace(old, b"@" * len(old)).replace(new, old).replace(b"@" * len(old), new)
        file.write_bytes(swapped)
    with pytest.raises(SourceError, match="differs from the planned one") as caught:
        execute(plan, small, tmp_path / "out", jobs=4)
    assert caught.value.code == "source-changed"
    assert found in (caught.value.found or "")
    assert not (tmp_path / "out").exists()
    unchanged = make_checkpoint(small, layers=2, zero_points=True)
    execute(quarkconv.Plan.from_json(plan.to_json()), unchanged, tmp_path / "out", jobs=4)


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_source_that_is_cut_while_it_is_read(
    source: Path, reference: dict[str, str], tmp_path: Path, jobs: int
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, model)
    cut = model / "model-00003-of-00003.safetensors"
    whole, modified = cut.read_bytes(), cut.stat().st_mtime_ns

    with pytest.raises(SourceError, match=r"ended while it was read|changed during") as caught:
        convert(model, out, jobs=jobs, progress=AfterAdvances(0, lambda: os.truncate(cut, 5000)))
    assert caught.value.exit_code == 3
    assert caught.value.file == str(cut)
    assert_unfinished(out)
    cut.write_bytes(whole)
    finished = {path.name for path in out.rglob("files/*.safetensors")}
    for shard in quarkconv.plan_conversion(model, "fused-int8", max_shard_size=SHARD).shards:
        if shard.file in finished:  # another thread may have come to the end of one that has nothing of this file
            assert cut.name not in {piece.source.file for tensor in shard.tensors for piece in tensor.pieces}
    with pytest.raises(
        UsageError, match="a different unfinished conversion"
    ) as refused:  # it was written to: is it the same?
        convert(model, out)
    assert refused.value.found == f"{cut.name} of the source was written to since"
    os.utime(cut, ns=(modified, modified))
    assert snapshot(convert(model, out)) == reference


def write_same_bytes(file: Path) -> None:
    """As a second download would: not a byte differs, but it was written to."""
    time.sleep(0.02)  # file systems keep times to a few milliseconds
    file.write_bytes(file.read_bytes())


def replace(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)
    other.replace(file)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (write_same_bytes, "a later time of modification"),
        (lambda file: os.truncate(file, file.stat().st_size + 1), "bytes"),
        (replace, "a different file with that name"),
        (lambda file: file.unlink(), "No such file"),
    ],
)
def test_a_source_that_changes_is_reported_and_its_output_is_not_complete(
    source: Path, tmp_path: Path, change: Callable[[Path], None], found: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, model)
    file = model / "model-00002-of-00003.safetensors"
    with pytest.raises(SourceError, match="changed during the conversion") as caught:
        convert(model, out, progress=AfterAdvances(0, lambda: change(file)))
    assert caught.value.code == "source-changed"
    assert caught.value.file == str(file)
    assert found in (caught.value.found or "")
    assert "--overwrite" in (caught.value.hint or "")
    assert_unfinished(out)
    assert not list(out.rglob("files/*.safetensors"))
    assert not list(out.rglob("notes/*"))


def test_a_file_that_the_shard_does_not_read_may_change(source: Path, tmp_path: Path) -> None:
    """What matters is checked where it matters: shards that were made before stay finished."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, model)
    plan = quarkconv.plan_conversion(model, "fused-int8", max_shard_size=1_000_000)
    readers = [
        {piece.source.file for tensor in shard.tensors for piece in tensor.pieces}
        for shard in plan.shards
    ]  # fmt: skip
    one = next(number for number, files in enumerate(readers) if len(files) < 3)
    other = sorted({file.name for file in plan.sources} - readers[one])[0]
    seen: list[int] = []

    def touch(_: int) -> None:
        seen.append(1)
        if len(seen) == one + 1:
            write_same_bytes(model / other)

    with pytest.raises(SourceError, match="changed during"):
        execute(plan, model, out, jobs=1, progress=Bytes(touch))
    finished = {path.name for path in out.rglob("files/*.safetensors")}
    assert plan.shards[one].file in finished


LIMITED = """
import json, resource, sys
from quarkconv.cli.main import main

soft, hard, *commands = map(json.loads, sys.argv[1:])
for command in commands:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        main(command)
    except SystemExit as stop:
        print(json.dumps(stop.code))
"""
"""Runs commands in turn, each with this many files to open, which it may raise so far; prints their exit codes."""


def test_more_shards_than_a_process_may_open_by_default(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", layers=2, experts=12, shards=120)
    out, other = tmp_path / "out", tmp_path / "other"
    verify: list[list[str | Path]] = [["verify", out, "--source", model], ["verify", model]]
    codes, err = limited(100, 1000, arguments(model, out), *verify)
    assert (codes, err) == ([0, 0, 0], "")
    verify[0].append("--bytes-only")
    codes, err = limited(100, 100, arguments(model, other), *verify)
    assert codes == [3, 3, 3]
    assert err.count("Too many open files") == err.count("ulimit -n") == 3
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 100


def limited(soft: int, hard: int, *commands: Sequence[str | Path]) -> tuple[list[int], str]:
    """Run commands by :data:`LIMITED`: their exit codes, and stderr of all."""
    words = [json.dumps([str(word) for word in command]) for command in commands]
    process = start(LIMITED, soft, hard, *words)
    out, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 0, err
    return [int(line) for line in out.splitlines() if line.isdecimal()], err


# Paths


@pytest.mark.parametrize(
    "name",
    ["größe 模型".encode(), b"latin-1 \xe9\xff", b"-to", b"a\nb\tc \x1b[31m", b"x" * 230],
    ids=["utf-8", "latin-1", "option", "control", "long"],
)
def test_any_path_works(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes) -> None:
    expected = snapshot(convert(small, tmp_path / "plain"))
    parent = tmp_path / "odd"
    parent.mkdir()
    odd = Path(os.fsdecode(os.fsencode(parent) + b"/" + name))
    shutil.copytree(small, odd)
    code, _, err = run_cli(capsys, "convert", odd, "--to", "fused-int8", "--max-shard-size", str(SHARD))
    assert code == 0, err
    assert "\x1b" not in err
    out = odd.with_name(f"{odd.name}-fused-int8")
    assert snapshot(out) == expected
    for command in ("inspect", "convert"):
        code, text, err = run_cli(capsys, command, out, *(["--to", "fused-int8"] if command == "convert" else []))
        assert "Traceback" not in err
        assert "\x1b" not in text + err


def test_a_path_that_is_too_long_is_reported(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(small)
    for out in (tmp_path / ("y" * 300), tmp_path.joinpath(*["z" * 200] * 25)):
        code, _, err = run_cli(capsys, "convert", small, "--to", "fused-int8", "--out", out)
        assert code == 5
        assert "File name too long" in err
        assert "Traceback" not in err
    named = tmp_path / ("m" * 250)
    shutil.copytree(small, named)
    code, _, err = run_cli(capsys, "convert", named, "--to", "fused-int8")  # no room for "-fused-int8"
    assert code == 5
    assert "File name too long" in err
    assert "--out" in err
    assert snapshot(small) == before


def test_a_very_deep_output_works(small: Path, tmp_path: Path) -> None:
    expected = snapshot(convert(small, tmp_path / "plain"))
    deep = tmp_path
    while len(str(deep)) < 3800:
        deep = deep / ("d" * 200)
    assert snapshot(convert(small, deep)) == expected


def test_a_source_without_read_permission_is_reported(small: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    (small / "model-00001-of-00002.safetensors").chmod(0o600)
    as_nobody = (
        "import os, sys\nfrom quarkconv.cli.main import main\nimport rich.text\n"
        "import concurrent.futures.thread, logging, quarkconv.convert.conversion\n"
        "import quarkconv.cli.program, quarkconv.cli.convert  # the standard library may lie where only root can read\n"
        "os.setgid(65534); os.setuid(65534)\nmain(sys.argv[1:])"
    )
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    process = start(as_nobody, *arguments(small, tmp_path / "open" / "out"))
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 3, err
    assert "Permission denied" in err
    assert "model-00001-of-00002.safetensors" in err
    assert "Traceback" not in err
    assert sys.platform.startswith("linux")
