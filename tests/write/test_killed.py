"""Killed at any moment: the same command gives the same bytes, and until then nothing looks like a model."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.conversions import SMALL_STEPS, STAGING, arguments, assert_unfinished, convert, start_slow
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start

pytestmark = pytest.mark.long(45)

KILLED = (
    SMALL_STEPS
    + """
limit, calls = int(sys.argv[1]), 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for name in ("pwrite", "fsync", "fdatasync", "ftruncate", "replace", "mkdir", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
try:
    main(sys.argv[2:])
finally:
    print(calls)
"""
)
"""Kills itself just before the given call that changes the disk."""

DISTURBED = (
    SMALL_STEPS
    + """
import hashlib, json, shutil
from pathlib import Path
import quarkconv
from quarkconv.errors import SourceError, UsageError

source, folder, shard_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
NAMES = ("pwrite", "fsync", "fdatasync", "ftruncate", "replace", "mkdir", "unlink", "rmdir")
REAL = {name: getattr(os, name) for name in NAMES}
# A process that is killed leaves what it wrote to the system; waiting for the disk proves nothing here.
REAL["fsync"] = REAL["fdatasync"] = os.fsync = os.fdatasync = lambda descriptor: None

def convert(out, overwrite=False):
    quarkconv.convert_checkpoint(
        source, "fused-int8", out, max_shard_size=shard_size, jobs=1, overwrite=overwrite
    )

def snapshot(out):
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

def disturbed(out, moment, overwrite=False):
    '''A conversion in a process of its own that dies before call number `moment`; returns its status.'''
    child = os.fork()
    if child == 0:
        calls = 0
        def counted(name):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return REAL[name](*args, **kwargs)
            return call
        for name in NAMES:
            setattr(os, name, counted(name))
        try:
            convert(out, overwrite)
        except BaseException as error:
            print(moment, repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
"""
)
"""Kills a conversion before one of its calls that change the disk."""

EVERY_MOMENT = (
    DISTURBED
    + """
convert(folder / "undisturbed")
expected = snapshot(folder / "undisturbed")
moment, kinds, failures = 0, {}, []
while True:
    moment += 1
    out = folder / str(moment)
    status = disturbed(out, moment)
    if status == 0:
        break
    if not os.WIFSIGNALED(status):
        failures.append([moment, "did not die"])
        break
    finished = {path.name: path.stat().st_ino for path in out.glob(".quarkconv/files/*.safetensors")}
    if (out / "config.json").exists():
        kind = "complete"
        now = {name: digest for name, digest in snapshot(out).items() if not name.startswith(".quarkconv")}
        if now != expected:
            failures.append([moment, "config.json was there before the rest"])
        if not (out / ".quarkconv" / "plan.json").exists():
            quarkconv.inspect_checkpoint(out)
    else:
        kind = "unfinished" if (out / ".quarkconv").exists() else "nothing"
        try:
            quarkconv.inspect_checkpoint(out)
            failures.append([moment, "taken for a model"])
        except SourceError:
            pass
    kinds[kind] = kinds.get(kind, 0) + 1
    kinds[f"{len(finished)} finished"] = kinds.get(f"{len(finished)} finished", 0) + 1
    convert(out) if kind != "complete" or (out / ".quarkconv").exists() else None
    if snapshot(out) != expected:
        failures.append([moment, "other bytes"])
    if any((out / name).stat().st_ino != inode for name, inode in finished.items()):
        failures.append([moment, "a finished shard was written again"])
    shutil.rmtree(out)
print(json.dumps({"moments": moment - 1, "kinds": kinds, "failures": failures}))
"""
)
"""Kills a conversion before each of its calls that change the disk, in turn, and goes on after it."""

OF_ANOTHER_SOURCE = (
    DISTURBED
    + """
other, before = Path(sys.argv[4]), folder / "before"
shutil.copytree(source, folder / "source")
if sys.argv[5] == "finished":
    convert(before)
else:
    disturbed(before, int(sys.argv[5]))
for path in other.iterdir():  # the same names, sizes and plan
    shutil.copyfile(path, source / path.name)
convert(folder / "undisturbed")
earlier, expected = snapshot(before), snapshot(folder / "undisturbed")
LAST = 24  # of those that delete the earlier conversion and begin the next
moment, outcomes, failures = 0, {}, []
while moment < LAST:
    moment += 1
    out = folder / str(moment)
    shutil.copytree(before, out)
    if not os.WIFSIGNALED(disturbed(out, moment, overwrite=True)):
        failures.append([moment, "did not die"])
    try:
        convert(out)
        outcome = "converted" if snapshot(out) == expected else "not replaced"
        if outcome == "not replaced" and snapshot(out) != earlier:
            failures.append([moment, sorted(snapshot(out))])
    except UsageError:
        outcome = "refused"
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    convert(out, overwrite=True)
    if snapshot(out) != expected:
        failures.append([moment, "other bytes"])
    shutil.rmtree(out)
print(json.dumps({"outcomes": outcomes, "failures": failures}))
"""
)
"""Replaces the conversion of a source that has changed since, killed before each of its calls that change the disk."""


def test_killed_before_every_call_that_changes_the_disk(small: Path, tmp_path: Path) -> None:
    (small / "tokenizer.json").write_text("{}")
    (small / "sub").mkdir()
    (small / "sub" / "notes.txt").write_text("a")
    process = start(EVERY_MOMENT, small, tmp_path, 4000)
    text, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 0, err
    assert err == ""
    report = json.loads(text)
    assert report["failures"] == []
    assert report["moments"] > 100
    kinds = report["kinds"]
    assert {"nothing", "unfinished", "complete"} <= kinds.keys()
    assert {f"{count} finished" for count in range(4)} <= kinds.keys()


@pytest.mark.parametrize("before", ["finished", 60])
def test_overwrite_that_is_killed_leaves_nothing_of_the_earlier_source(
    small: Path, tmp_path: Path, before: str | int
) -> None:
    other = make_checkpoint(tmp_path / "other", layers=2, zero_points=True, seed=1)
    process = start(OF_ANOTHER_SOURCE, small, tmp_path, 4000, other, before)
    text, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 0, err
    assert err == ""
    report = json.loads(text)
    assert report["failures"] == []
    assert {"converted", "refused"} <= report["outcomes"].keys()
    assert report["outcomes"].get("not replaced", 0) < 5  # before anything is deleted


def test_killed_at_random_times_the_same_command_gives_the_same_bytes(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "quarkconv", *map(str, arguments(source, tmp_path / "out", jobs=2))]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=PROCESS_TIMEOUT)
    whole = time.monotonic() - began
    assert snapshot(tmp_path / "out") == reference
    rng = random.Random(11)
    killed = 0
    for number in range(12):
        out = tmp_path / f"killed-{number}"
        words = [sys.executable, "-m", "quarkconv", *map(str, arguments(source, out, jobs=rng.choice([1, 2, 4])))]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # Most of the time goes into starting Python: the moments lie where the work is.
        time.sleep(whole * rng.uniform(0.3, 1.05))
        process.kill()
        process.communicate(timeout=PROCESS_TIMEOUT)
        killed += process.returncode == -signal.SIGKILL
        if not (out / "config.json").exists():
            assert_unfinished(out)
        if not (out / "config.json").exists() or (out / STAGING).exists():
            convert(source, out, jobs=2)
        assert snapshot(out) == reference, number
        shutil.rmtree(out)
    assert killed > 2


def test_killed_again_and_again_the_work_still_ends(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for moment in (60, 90, 120, 30):
        process = start(KILLED, moment, *arguments(source, out, jobs=2))
        process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode == -signal.SIGKILL
        assert_unfinished(out)
    convert(source, out)
    assert snapshot(out) == reference


def test_killed_while_it_moves_files_up_overwrite_starts_anew(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(KILLED, 0, *arguments(source, tmp_path / "counting"))
    total = int(process.communicate(timeout=PROCESS_TIMEOUT)[0].split()[-1])
    for moment in (total - 33, total - 22, total - 11):
        process = start(KILLED, moment, *arguments(source, out))
        process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode == -signal.SIGKILL
        convert(source, out, overwrite=True)
        assert snapshot(out) == reference
        shutil.rmtree(out)


def test_a_damaged_note_or_shard_is_written_again(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(KILLED, 250, *arguments(source, out))
    process.communicate(timeout=PROCESS_TIMEOUT)
    files = sorted((out / STAGING / "files").glob("*.safetensors"))
    assert len(files) >= 3
    os.truncate(files[0], files[0].stat().st_size - 1)
    (out / STAGING / "notes" / f"{files[1].name}.json").write_text("{")
    (out / STAGING / "notes" / f"{files[2].name}.json").unlink()
    convert(source, out)
    assert snapshot(out) == reference


def test_no_state_before_the_end_can_be_loaded_by_transformers(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    process = start(KILLED, 0, *arguments(source, tmp_path / "counting"))
    total = int(process.communicate(timeout=PROCESS_TIMEOUT)[0].split()[-1])
    for moment in (20, total // 2, total - 24):
        out = tmp_path / f"killed-{moment}"
        process = start(KILLED, moment, *arguments(source, out))
        process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode == -signal.SIGKILL
        assert_unfinished(out)
        for load in (transformers.AutoConfig.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
            with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
                load(out, local_files_only=True)
    assert list(out.glob("*.safetensors"))  # the last of them was killed with everything in place but config.json
    assert transformers.AutoConfig.from_pretrained(tmp_path / "counting").model_type == "qwen3_moe"


def test_inspect_shows_the_progress_of_a_conversion_and_how_to_resume(
    source: Path, reference: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's here"
    process = start_slow("pwrite", *arguments(source, out))
    process.kill()
    process.communicate(timeout=PROCESS_TIMEOUT)
    code, text, err = run_cli(capsys, "inspect", out, "--json")
    assert code == 3
    assert json.loads(text)["exit_code"] == 3
    assert "unfinished conversion" in err
    command = json.loads(text)["hint"].partition("`")[2].rpartition("`")[0]
    assert command == err.partition("`")[2].rpartition("`")[0]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment, capture_output=True, timeout=PROCESS_TIMEOUT)
    assert snapshot(out) == reference
