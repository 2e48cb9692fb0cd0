"""Many at once, and many one after the other: nothing fails, and nothing grows. A few by default, all with LOAD=1."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.program import snapshot

import quarkconv

FULL = bool(os.environ.get("LOAD"))
CONVERSIONS = 1000 if FULL else 40
WARM_UP = 100 if FULL else 20
"""Conversions after which what is kept once, such as caches, is there."""
INSPECTS, CONVERTS = (20, 4) if FULL else (5, 2)


def memory() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.timeout(3600)
def test_conversions_in_a_row_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File descriptors, threads, temporary files and memory of one process."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    model = make_checkpoint(tmp_path / "model", layers=2, experts=8, hidden=64, intermediate=64, shards=3)
    expected = None
    started, seen = time.perf_counter(), []
    for number in range(CONVERSIONS):
        out = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out").output
        if number % 50 == 0:
            found = snapshot(out)
            assert expected in (None, found)
            expected = found
        shutil.rmtree(out)
        if number + 1 in (WARM_UP, CONVERSIONS):
            gc.collect()
            seen.append((descriptors(), threading.active_count(), memory()))
    (files_before, threads_before, before), (files_after, threads_after, after) = seen
    assert files_after <= files_before
    assert threads_after <= threads_before  # those of an earlier test may have ended meanwhile
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tmp"]
    assert not list(temporary.iterdir())
    assert after - before < 16 * 2**20  # allocators keep what they have
    seconds, grown = time.perf_counter() - started, (after - before) / 2**20
    print(
        f"\n{CONVERSIONS} conversions in {seconds:.1f} s, {files_after} open files, {after / 2**20:.0f} MB of memory,"
    )
    print(f"{grown:.1f} MB more than after the {WARM_UP}th")


@pytest.mark.timeout(600)
def test_many_conversions_of_one_source_run_at_once(tmp_path: Path) -> None:
    """Inspections and conversions of the same source, each a process: all of them right, the source as it was."""
    model = make_checkpoint(tmp_path / "model", layers=2, experts=16, hidden=256, intermediate=256, shards=4)
    before = snapshot(model)
    alone = snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "alone").output)
    program = [sys.executable, "-m", "quarkconv"]
    commands = [[*program, "inspect", str(model), "--json", "--deep"] for _ in range(INSPECTS)]
    commands += [
        [*program, "convert", str(model), "--to", "fused-int8", "--out", str(tmp_path / f"out-{number}"), "--json"]
        for number in range(CONVERTS)
    ]
    started = time.perf_counter()
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    answers = [process.communicate() for process in running]
    seconds = time.perf_counter() - started
    for process, (stdout, stderr) in zip(running, answers, strict=True):
        assert process.returncode == 0, stderr
        json.loads(stdout)
    assert len({stdout for stdout, _ in answers[:INSPECTS]}) == 1
    assert snapshot(model) == before
    for number in range(CONVERTS):
        assert snapshot(tmp_path / f"out-{number}") == alone
    print(f"\n{INSPECTS} inspections and {CONVERTS} conversions at once in {seconds:.1f} s")


@pytest.mark.timeout(600)
def test_of_many_conversions_into_one_output_at_least_one_succeeds(tmp_path: Path) -> None:
    """One of them does it, the others say who; the output is whole."""
    model = make_checkpoint(tmp_path / "model", layers=2, experts=16, hidden=256, intermediate=256, shards=4)
    alone = snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "alone").output)
    command = [sys.executable, "-m", "quarkconv", "convert", str(model), "--to", "fused-int8", "--out"]
    running = [
        subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(CONVERTS)
    ]
    errors = [process.communicate()[1] for process in running]
    codes = [process.returncode for process in running]
    assert 0 in codes, errors
    assert set(codes) <= {0, 2, 5}  # 2: it was finished by then
    assert snapshot(tmp_path / "out") == alone
