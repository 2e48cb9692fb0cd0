"""Entries that are not regular files: pipes without a writer, endless devices, links that lead elsewhere."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hostile import corrupted, judge
from support.model import SECOND, Model
from support.moe_model import INDEX
from support.program import run_cli, snapshot

from quarkconv import inspect_checkpoint


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            bound.bind(f"/proc/self/fd/{directory}/{path.name}")  # such a path may be no longer than 100 characters
        finally:
            os.close(directory)


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": bind,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a directory": Path.mkdir,
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to the processes' files": lambda path: path.symlink_to("/proc/self/environ"),
}
PLACES = {SECOND: ("shard-missing", "file-outside"), INDEX: ("index-invalid",), "config.json": ("config-invalid",)}


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("kind", STRANGE)
def test_pipes_sockets_and_devices_are_neither_waited_for_nor_read(
    kind: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def corrupt(folder: Path) -> None:
        (folder / target).unlink()
        STRANGE[kind](folder / target)

    verdict = judge(corrupted(tmp_path / "model", corrupt), capsys)
    assert (verdict.inspect, verdict.convert) == (1, 3)
    assert verdict.codes[0] in (*PLACES[target], "file-outside")


@pytest.mark.parametrize("name", ["notes.txt", "quarkconv.json", "sub/notes.txt"])
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a link to nothing", "a link in a circle"])
def test_special_files_are_not_copied(kind: str, name: str, tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    STRANGE[kind](folder / name)
    from quarkconv import convert_checkpoint

    output = convert_checkpoint(folder, "fused-int8", tmp_path / "out").output
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert name == "quarkconv.json" or not (output / name).exists()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text("PRIVATE KEY")
    return path


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "sub/deeper/notes.txt", "modeling_x.py", "config.json", INDEX, SECOND]
)
def test_a_link_out_of_the_directory_is_not_followed(
    name: str, relative: bool, secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a stranger's repository could have a private key copied into a directory that is then published."""
    folder = Model().write(tmp_path / "model")
    path = folder / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(secret, path.parent) if relative else secret)
    verdict = judge(folder, capsys)
    assert (verdict.inspect, verdict.codes[0]) == (1, "file-outside")
    assert (verdict.convert, verdict.error["code"], verdict.error["file"]) == (3, "file-outside", str(path))
    assert "hard link" in verdict.error["hint"]


def test_a_shard_linked_from_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, folder = Model().write(tmp_path / "private"), Model().write(tmp_path / "model")
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(other / SECOND)
    verdict = judge(folder, capsys)
    assert (verdict.inspect, verdict.codes) == (1, ["file-outside"])
    (folder / SECOND).unlink()
    os.link(other / SECOND, folder / SECOND)  # the way that the hint names
    assert inspect_checkpoint(folder).ok


def test_a_folder_that_is_a_link_is_not_entered(
    secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Model().write(tmp_path / "model")
    (folder / "figures").symlink_to(secret.parent)
    verdict = judge(folder, capsys)
    assert (verdict.inspect, verdict.codes, verdict.convert) == (1, ["file-outside"], 3)


def test_links_within_the_directory_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Model().write(tmp_path / "model")
    (folder / "weights").mkdir()
    shutil.move(folder / SECOND, folder / "weights" / "second.bin")
    (folder / SECOND).symlink_to("weights/second.bin")
    (folder / "LICENSE").write_text("free")
    (folder / "LICENSE.txt").symlink_to(folder / "LICENSE")
    (tmp_path / "link").symlink_to(folder)  # the directory itself may be one
    out = tmp_path / "out"
    assert run_cli(capsys, "convert", tmp_path / "link", "--to", "fused-int8", "--out", out)[0] == 0
    assert (out / "LICENSE.txt").read_text() == "free"
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize("layout", ["cache", "cache shared by repos", "downloaded with links"])
def test_blobs_of_the_hubs_cache_are_followed(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A snapshot is made of links to blobs; so were downloads to a directory until huggingface_hub 0.23.

    From huggingface_hub 2.4 on a blob may itself be a link, to one that all repos of the cache share.
    """
    plain = Model().write(tmp_path / "plain")
    repo = tmp_path / "hub" / "models--org--name"
    folder = tmp_path / "download" if layout == "downloaded with links" else repo / "snapshots" / "abc"
    (repo / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        stored = blob
        if layout == "cache shared by repos":
            stored = tmp_path / "hub" / "blobs" / f"a{number}" / f"a{number}{number:062x}"
            stored.parent.mkdir(parents=True)
            blob.symlink_to(os.path.relpath(stored, blob.parent))
        shutil.copy(file, stored)
        (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    for source, out in ((plain, tmp_path / "one"), (folder, tmp_path / "two")):
        assert run_cli(capsys, "convert", source, "--to", "fused-int8", "--out", out)[0] == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_folders_nested_thousands_deep_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Model().write(tmp_path / "model")
    home = Path.cwd()
    try:
        os.chdir(folder)
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.txt").touch()
    finally:
        os.chdir(home)
    assert run_cli(capsys, "inspect", folder)[0] == 0
    code, _, stderr = run_cli(capsys, "convert", folder, "--to", "fused-int8", "--out", tmp_path / "out")
    assert code == 0, stderr  # an unreachable entry is not a file of the model
    subprocess.run(["rm", "-rf", folder / "d"], check=True)  # pytest's own clean-up calls itself for each folder


@pytest.mark.parametrize("name", ["config.json", "quarkconv.json", "model-00001-of-00001.safetensors", INDEX])
def test_a_folder_named_as_a_file_of_the_output(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def corrupt(folder: Path) -> None:
        if (folder / name).exists():
            (folder / name).unlink()
        (folder / name).mkdir()
        (folder / name / "notes.txt").touch()

    verdict = judge(corrupted(tmp_path / "model", corrupt), capsys)
    assert verdict.convert in (3, 4)
