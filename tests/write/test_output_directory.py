"""What else is in the output directory: other work is refused with the difference, another process is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import assert_same_tensors, edit_checkpoint, load, make_checkpoint
from support.conversions import STAGING, arguments, convert, fill_the_disk_later, start_slow
from support.expected import fused_int8
from support.program import PROCESS_TIMEOUT, run_cli, snapshot

import quarkconv
from quarkconv.errors import SourceError, UsageError
from quarkconv.plan.manifest import read_manifest
from quarkconv.write import state
from quarkconv.write.locks import lock_folder
from quarkconv.write.output import output_at


def test_unfinished_work_with_other_options_is_refused_and_kept(
    source: Path, reference: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fill_the_disk_later(source, out)
    before = snapshot(out)
    code, _, err = run_cli(capsys, "convert", source, "--to", "fused-int8", "--out", out, "--max-shard-size", "6MB")
    assert code == 2
    assert "a different unfinished conversion" in err
    assert "largest shard size 4500000, now 6000000" in err
    assert "--overwrite" in err
    assert snapshot(out) == before
    assert snapshot(convert(source, out)) == reference


def test_unfinished_work_of_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill_the_disk_later(source, out)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        convert(other, out)
    assert caught.value.found == f"source {source}, now {other}"
    assert snapshot(convert(other, out, overwrite=True)) != {}
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 12345.0
    assert_same_tensors(load(out), fused_int8(other))


@pytest.mark.parametrize("unfinished", [False, True])
def test_overwrite_starts_anew(source: Path, reference: dict[str, str], tmp_path: Path, unfinished: bool) -> None:
    out = tmp_path / "out"
    if unfinished:
        fill_the_disk_later(source, out)
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
    fill_the_disk_later(other, out)
    (out / STAGING / "plan.json").unlink()
    assert snapshot(convert(source, out)) == reference


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once_the_second_names_the_first(
    source: Path, reference: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: bool
) -> None:
    out = tmp_path / "out"
    first = start_slow("pwrite", *arguments(source, out))
    code, _, err = run_cli(capsys, *arguments(source, out), *(["--overwrite"] if overwrite else []))
    assert code == 5
    assert "Another process" in err
    assert f"process {first.pid}" in err
    assert first.poll() is None
    first.kill()  # its lock is gone with it
    first.communicate(timeout=PROCESS_TIMEOUT)
    assert snapshot(convert(source, out)) == reference


# The difference is named


def begun(**changes: Any) -> dict[str, Any]:
    """What a conversion was begun with."""
    return {
        "quarkconv": "1.0", "target": "fused-int8", "max_shard_size": 5, "config": "c", "copies": [["a.txt", 1]],
        "sources": [["one", 10, 1], ["two", 20, 2]], "plan": "p", "shards": 3, "command": "x", **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"command": "y"}, None),
        ({"quarkconv": "2.0"}, "version of quarkconv 1.0, now 2.0"),
        ({"target": "bf16", "plan": "q"}, "target fused-int8, now bf16"),
        ({"max_shard_size": 6, "plan": "q"}, "largest shard size 5, now 6"),
        ({"config": "d", "plan": "q"}, "config.json of the source has changed"),
        ({"copies": [], "plan": "q"}, "other files of the source have changed"),
        ({"sources": [["one", 10, 1]], "plan": "q"}, "other shards in the source: two"),
        ({"sources": [["one", 10, 1], ["two", 21, 2]], "plan": "q"}, "two of the source had 20 bytes, now 21"),
        ({"sources": [["one", 10, 1], ["two", 20, 3]]}, "two of the source was written to since"),
        ({"plan": "q"}, "another plan"),
    ],
)
def test_the_difference_is_named(changes: dict[str, Any], words: str | None) -> None:
    assert state.difference(begun(), begun(**changes)) == words


@pytest.mark.parametrize("notes", [None, 3, [], {}, {"sources": 5}, {"sources": [[1]]}])
def test_invalid_notes_are_refused(notes: object) -> None:
    if isinstance(notes, dict) and "sources" in notes:
        notes = begun(**notes, plan="q")
    assert state.difference(notes, begun()) is not None


# The lock


def test_a_finished_output_keeps_the_folder_in_which_another_process_has_begun(small: Path, tmp_path: Path) -> None:
    out = convert(small, tmp_path / "out")
    manifest = read_manifest(out)
    assert manifest is not None
    descriptor, _ = lock_folder(out / STAGING)  # as --overwrite does first
    assert output_at(out).finished(manifest.plan) == manifest
    assert (out / STAGING / "lock").exists()
    os.close(descriptor)
    assert output_at(out).finished(manifest.plan) == manifest
    assert not (out / STAGING).exists()


@pytest.fixture
def silly_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, an open file whose name is removed gets another until it is closed; here the lock of a folder."""
    unlink, close = os.unlink, os.close
    renamed: list[int] = []

    def unlinking(path: Any, *, dir_fd: int | None = None) -> None:
        if path != "lock" or dir_fd is None:
            unlink(path, dir_fd=dir_fd)
            return
        os.rename(path, ".nfs0001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        renamed.append(os.stat(".nfs0001", dir_fd=dir_fd).st_ino)

    def closing(descriptor: int) -> None:
        status, link = os.fstat(descriptor), f"/proc/self/fd/{descriptor}"
        path = os.readlink(link)
        close(descriptor)
        if status.st_ino in renamed and path.endswith(".nfs0001"):
            unlink(path)

    monkeypatch.setattr(os, "unlink", unlinking)
    monkeypatch.setattr(os, "close", closing)


@pytest.mark.usefixtures("silly_renames")
def test_on_nfs_nothing_is_left_of_the_working_folder(small: Path, tmp_path: Path) -> None:
    out = convert(small, tmp_path / "out")
    assert not (out / STAGING).exists()


@pytest.mark.usefixtures("silly_renames")
def test_on_nfs_a_scale_that_is_not_finite_is_reported_as_it_is(small: Path, tmp_path: Path) -> None:
    scale = "model.layers.1.mlp.experts.0.down_proj.weight_scale"
    ref = quarkconv.inspect_checkpoint(small).description.checkpoint.refs()[scale]
    with (small / ref.file).open("r+b") as file:
        file.seek(ref.start)
        file.write(b"\0\0\xc0\x7f")
    with pytest.raises(SourceError, match="A scale is NaN"):
        convert(small, tmp_path / "out")
    assert not (tmp_path / "out" / STAGING).exists()


def test_a_lock_of_a_folder_that_was_removed_meanwhile_is_not_trusted(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock and getting it, the process that held it may have finished and removed the folder."""
    import fcntl

    expected = convert(small, tmp_path / "expected")
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    flock = fcntl.flock
    removed: list[int] = []

    def finish_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(1)
            shutil.rmtree(out / STAGING)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    convert(small, out)
    assert removed
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}


def test_a_refused_directory_is_left_as_it_was(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            convert(small, out, overwrite=overwrite)
        assert sorted(path.name for path in out.iterdir()) == ["mine.txt"]
