"""Writing fails: one message that says what to do, exit code 5, and the same command goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.conversions import SMALL_STEPS, arguments, assert_unfinished, convert
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start

from quarkconv.errors import QuarkconvError, WriteError
from quarkconv.write.space import allocated

pytestmark = pytest.mark.long(5)


class Failing:
    """os.pwrite that fails after a number of calls."""

    def __init__(self, number: int, after: int) -> None:
        self.error = OSError(number, os.strerror(number))
        self.left = after
        self.pwrite = os.pwrite

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.pwrite(descriptor, data, offset)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota is used up"), (errno.EIO, "Writing failed")],
)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_failing_write_is_one_message_and_the_work_resumes(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], number: int, words: str, after: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Failing(number, after))
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


def test_the_first_cause_is_reported_when_the_other_workers_stop(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, failed = os.pwrite, threading.Event()
    first: list[str] = []

    def fail_in_the_second_worker(descriptor: int, data: memoryview, offset: int) -> int:
        worker = threading.current_thread().name
        if worker == "MainThread":  # which notes who holds the lock
            return pwrite(descriptor, data, offset)
        if not first:
            first.append(worker)
        if worker != first[0]:
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        failed.wait(10)
        time.sleep(0.05)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fail_in_the_second_worker)
    with pytest.raises(WriteError, match="disk is full"):
        convert(source, tmp_path / "out", jobs=2)
    assert failed.is_set()


def test_space_is_checked_before_the_first_byte(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
        with pytest.raises(WriteError, match="Not enough space") as caught:
            convert(source, out)
    assert caught.value.found == "1 MB"
    assert "free 30 MB more" in (caught.value.hint or "")
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
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 5
    assert re.search(r"file: +\S+/model-\d+-of-\d+\.safetensors\n  found: +File too large", err), err
    assert "Traceback" not in err
    assert_unfinished(out)
    assert snapshot(convert(source, out)) == reference


def test_an_output_that_is_a_file_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(QuarkconvError) as caught:
        convert(small, tmp_path / "out")
    assert caught.value.exit_code in (2, 5)
    assert (tmp_path / "out").read_text() == "mine"


# A disk that gets full

FULL_DISK = """
import sys
from quarkconv.cli.main import main
import quarkconv.write.staging as staging
staging.require_space = lambda *args: None  # another program takes the space after the check
main(sys.argv[1:])
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 64 MB, of its own."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as handle:
        handle.truncate(64 * 2**20)
    folder.mkdir()
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mkfs is None:
        pytest.skip("needs mkfs.ext4")
    subprocess.run([mkfs, "-q", "-m", "0", "-F", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_gets_full_is_one_message_and_nothing_is_lost(
    source: Path, reference: dict[str, str], small_disk: Path
) -> None:
    out, ballast = small_disk / "out", small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 12_000_000))
    process = start(FULL_DISK, *arguments(source, out, jobs=2))
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 5, err
    assert err.count("error:") == 1
    assert "The disk is full" in err
    assert "Traceback" not in err
    finished = {path.name: path.stat().st_ino for path in (out / ".quarkconv" / "files").glob("*.safetensors")}
    assert finished
    assert_unfinished(out)
    missing = float(err.partition("free ")[2].partition(" MB")[0]) * 1e6
    assert 0 < missing < 25e6

    process = start(SMALL_STEPS + "main(sys.argv[1:])", *arguments(source, out, jobs=2))  # now it is checked
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 5
    assert "Not enough space" in err
    ballast.unlink()
    convert(source, out)
    assert snapshot(out) == reference
    for name, inode in finished.items():
        assert (out / name).stat().st_ino == inode


def test_overwrite_keeps_the_earlier_conversion_when_the_new_one_would_not_fit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = convert(source, tmp_path / "out")
    before = snapshot(out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(WriteError, match="Not enough space"):  # it is as large, but for the notes beside it
        convert(source, out, overwrite=True)
    assert snapshot(out) == before
    size = allocated(out.rglob("*"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=4_000_000 + size - allocated(out.rglob("*")))
    )
    convert(source, out, overwrite=True)  # what is deleted first makes the room
    assert snapshot(out) == before


# No permission

AS_NOBODY = """
import os, sys
from quarkconv.cli.main import main
import concurrent.futures.thread, logging, quarkconv.convert.conversion, rich.text, rich.console
import quarkconv.cli.program, quarkconv.cli.convert
from quarkconv.version import own_version
own_version()  # the standard library may lie where only root can read
os.setgid(65534)
os.setuid(65534)
main(sys.argv[1:])
"""


@pytest.mark.parametrize("folder_kind", ["parent", "directory", "folder"])
def test_a_folder_without_write_permission_is_reported(source: Path, tmp_path: Path, folder_kind: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    for file in source.rglob("*"):
        file.chmod(file.stat().st_mode | 0o444)
    for folder in (source.parent, tmp_path):
        for path in (folder, *folder.parents):
            if path != Path(path.anchor) and path.stat().st_mode & 0o055 != 0o055:
                path.chmod(0o755)
    out = tmp_path / "out"
    if folder_kind != "parent":
        out.mkdir()
    if folder_kind == "folder":
        (out / ".quarkconv").mkdir()
    process = start(AS_NOBODY, *arguments(source, out))
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 5, err
    assert "Permission denied" in err
    assert "give another directory with --out" in err
    assert str(out) in err
    assert "Traceback" not in err
