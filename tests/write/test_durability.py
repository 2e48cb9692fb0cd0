"""The order in which data reaches the disk, by the system calls (recorded with strace)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.conversions import SMALL_STEPS, STAGING, arguments
from support.program import PROCESS_TIMEOUT, snapshot

CALLS = "openat,close,write,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,rmdir"


class Call(NamedTuple):
    """A system call: its name, the file that it was about, and the new name of that when it was renamed."""

    name: str
    path: str
    to: str = ""


@pytest.fixture(scope="module")
def recorded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Call], Path]:
    """The calls of one conversion that succeeded, in order, and its output; paths are relative to that."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace (Debian's strace)")
    folder = tmp_path_factory.mktemp("traced")
    out, log = folder / "out", folder / "log"
    command = ["strace", "-f", "-qq", "-y", "-s", "0", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(log)]
    script = SMALL_STEPS + "main(sys.argv[1:])"
    words = [*command, sys.executable, "-c", script, *map(str, arguments(source, out, jobs=2))]
    run = subprocess.run(words, capture_output=True, text=True, timeout=PROCESS_TIMEOUT, check=False)
    if "ptrace" in run.stderr:
        pytest.skip("tracing a process is not permitted")
    assert run.returncode == 0, run.stderr
    return list(parse(log.read_text(errors="replace"), out)), out


def parse(log: str, out: Path) -> list[Call]:
    """The calls of a recording by strace -f -y; a call that another thread's interrupts counts from its end."""
    calls, begun = [], dict[str, str]()
    for line in log.splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = begun.pop(thread) + text[resumed.end() :]
        match = re.match(r"(\w+)\((.*)\)\s+= (-?\d+)", text)
        if match is None or int(match[3]) < 0:
            continue
        name, words = match[1], match[2]
        by_number = name in ("fsync", "fdatasync", "write", "pwrite64", "ftruncate")
        paths = re.findall(r"\d+<([^>]+)>", words)[:1] if by_number else re.findall(r'"([^"]*)"', words)
        inside = [Path(path).relative_to(out).as_posix() for path in paths if Path(path).is_relative_to(out)]
        if inside:
            calls.append(Call(name, *inside))
    return calls


def test_the_recording_holds_what_was_done(recorded: tuple[list[Call], Path], reference: dict[str, str]) -> None:
    calls, out = recorded
    assert snapshot(out) == reference
    names = {call.name for call in calls}
    assert {"openat", "write", "pwrite64", "ftruncate", "fsync", "rename"} <= names
    assert sum(call.name == "pwrite64" for call in calls) > 50


def test_every_file_is_on_disk_before_it_has_its_name(
    recorded: tuple[list[Call], Path], reference: dict[str, str]
) -> None:
    calls, _ = recorded
    for name in reference:
        written = [
            index for index, call in enumerate(calls)
            if call.name in ("write", "pwrite64", "ftruncate") and call.path == f"{STAGING}/parts/{name}"
        ]  # fmt: skip
        synced = calls.index(Call("fsync", f"{STAGING}/parts/{name}"))
        named = calls.index(Call("rename", f"{STAGING}/parts/{name}", f"{STAGING}/files/{name}"))
        moved = calls.index(Call("rename", f"{STAGING}/files/{name}", name))
        assert written, name
        assert written[-1] < synced < named < moved, name
        if name.endswith(".safetensors"):
            note = f"{STAGING}/notes/{name}.json"
            assert synced < calls.index(Call("fsync", f"{note}.part"))
            assert calls.index(Call("rename", f"{note}.part", note)) < named
            assert Call("fsync", f"{STAGING}/notes") in calls[calls.index(Call("rename", f"{note}.part", note)) : named]


def test_everything_is_on_disk_before_the_manifest_that_names_it_and_config_json_is_last(
    recorded: tuple[list[Call], Path], reference: dict[str, str]
) -> None:
    calls, _ = recorded
    manifest, config = "quarkconv.json", "config.json"
    begun = next(
        index for index, call in enumerate(calls)
        if call.name == "openat" and call.path == f"{STAGING}/parts/{manifest}"
    )  # fmt: skip
    others = [name for name in reference if name != manifest]
    for name in others:  # the data and the name of each, before the manifest is begun
        named = calls.index(Call("rename", f"{STAGING}/parts/{name}", f"{STAGING}/files/{name}"))
        folder = Path(f"{STAGING}/files/{name}").parent.as_posix()
        assert Call("fsync", folder) in calls[named:begun], name
    moved = {name: calls.index(Call("rename", f"{STAGING}/files/{name}", name)) for name in reference}
    for name in set(others) - {config}:  # and the name under which it is found, before the manifest has its own
        folder = Path(name).parent.as_posix()
        assert Call("fsync", folder) in calls[moved[name] : moved[manifest]], name
    assert Call("fsync", ".") in calls[moved[manifest] : moved[config]]
    assert max(moved.values()) == moved[config]
    removed = [index for index, call in enumerate(calls) if call.name in ("unlink", "unlinkat", "rmdir")]
    assert Call("fsync", ".") in calls[moved[config] : removed[0]]
    assert min(removed) > moved[config]
    assert Call("fsync", ".") in calls[removed[-1] :]


@pytest.mark.parametrize("lacking", [f"{STAGING}/parts/tokenizer.json", f"{STAGING}/files", f"{STAGING}/notes", "."])
def test_the_tests_above_notice_a_missing_fsync(
    recorded: tuple[list[Call], Path], reference: dict[str, str], lacking: str
) -> None:
    calls, out = recorded
    without = [call for call in calls if call != Call("fsync", lacking)]
    assert len(without) < len(calls)

    def check() -> None:
        test_every_file_is_on_disk_before_it_has_its_name((without, out), reference)
        test_everything_is_on_disk_before_the_manifest_that_names_it_and_config_json_is_last((without, out), reference)

    with pytest.raises((ValueError, AssertionError)):
        check()
