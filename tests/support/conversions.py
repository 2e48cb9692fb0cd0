"""Conversions to disturb: the command that is run, what an undisturbed one gives, and ways to stop it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quarkconv
from quarkconv.errors import SourceError, WriteError
from quarkconv.files.base import Files
from quarkconv.files.local import LocalFiles
from quarkconv.plan.plan import plan_digest
from quarkconv.progress import SILENT, Progress
from quarkconv.write.execution import Execution
from quarkconv.write.modes import Whole
from quarkconv.write.output import output_at
from quarkconv.write.write import write_output
from support.program import snapshot, start
from support.progress import FullDisk

STAGING = ".quarkconv"
SHARD = 4_500_000


def convert(source: Path, out: Path, **options: Any) -> Path:
    """Convert in this process; returns the output."""
    options = {"max_shard_size": SHARD, "jobs": 1, **options}
    return quarkconv.convert_checkpoint(source, "fused-int8", out, **options).output


def execute(plan: quarkconv.Plan, source: Path | Files, out: Path, *, jobs: int, progress: Progress = SILENT) -> None:
    """Carry out a plan that was made before."""
    files = LocalFiles(source) if isinstance(source, Path) else source
    write_output(Execution(plan, plan_digest(plan), files, output_at(out), jobs, progress), Whole())


def assert_converts_alike(repo: str, model: Path, folder: Path) -> None:
    """A repo on the Hub converts to the same bytes as the directory that was published there."""
    quarkconv.convert_checkpoint(repo, "fused-int8", folder / "remote")
    quarkconv.convert_checkpoint(model, "fused-int8", folder / "local")
    assert snapshot(folder / "remote") == snapshot(folder / "local")


def arguments(source: Path, out: Path, jobs: int = 1) -> list[str | Path]:
    """The command that does what :func:`convert` does."""
    sizes = ["--max-shard-size", str(SHARD), "--jobs", str(jobs)]
    return ["convert", source, "--to", "fused-int8", "--out", out, *sizes]


def assert_unfinished(out: Path) -> None:
    """Nothing in a directory can be taken for a model."""
    assert not (out / "config.json").exists()
    with pytest.raises(SourceError) as caught:
        quarkconv.inspect_checkpoint(out)
    if (out / STAGING).exists():
        assert caught.value.code == "conversion-unfinished"
        assert "unfinished conversion" in caught.value.message
        assert "again" in (caught.value.hint or "")


def fill_the_disk_later(source: Path, out: Path, blocks: int = 2) -> None:
    """Leave unfinished work in ``out`` with some shards done."""
    with pytest.raises(WriteError):
        convert(source, out, progress=FullDisk(blocks))
    assert list((out / STAGING / "files").glob("*.safetensors"))


SHARD_SIZE = 6000
"""Divides a tiny conversion into several shards."""

SMALL_STEPS = """
import os, signal, sys, time
from quarkconv.cli.main import main
import quarkconv.write.executor, quarkconv.write.segments
quarkconv.write.executor.BUFFER_BYTES = 2**18
quarkconv.write.segments.cut.__defaults__ = (2**20,)
"""
"""Makes a shard of a few MB many writes in several segments."""

SLOW = (
    SMALL_STEPS
    + """
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
)
"""Takes its time for one kind of call, and says when it is at work."""


def start_slow(name: str, *args: str | Path, setup: str = "") -> Any:
    """Start the command with slow calls of ``os.name``, after the script ``setup``; returns when it is at work."""
    process = start(setup + SLOW, name, *args)
    assert process.stderr is not None
    assert process.stderr.readline() == "working\n"
    return process
