"""What is copied beside the weights."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.conversions import convert
from support.program import snapshot

from quarkconv.errors import SourceError
from quarkconv.plan.pieces import SourceFile
from quarkconv.write import copying
from quarkconv.write.copying import copy_file


def test_other_files_are_copied_and_other_copies_of_the_weights_are_not(small: Path, tmp_path: Path) -> None:
    copied = {
        "tokenizer.json": b"{}", "NOTES.md": b"# model\n", "chat_template.jinja": b"", "modeling_x.py": b"raise 1",
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


# The copy of one file


def test_a_copy_of_another_length_than_planned_is_reported(small: Path, tmp_path: Path) -> None:
    (small / "notes.txt").write_text("12345")
    with pytest.raises(SourceError, match="changed") as caught:
        copy_file(small, SourceFile("notes.txt", 4), tmp_path / "part")
    assert (caught.value.expected, caught.value.found) == ("4 bytes", "5 bytes")
    with pytest.raises(SourceError) as caught:
        copy_file(small, SourceFile("nothing.txt", 4), tmp_path / "part")
    assert caught.value.code == "shard-missing"


def test_a_clone_is_read_back(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a clone is possible the bytes come from the file system: what is checked is the copy itself."""
    (small / "notes.txt").write_text("12345")
    copied = copy_file(small, SourceFile("notes.txt", 5), tmp_path / "copy")

    def clone(original: int, copy: int) -> bool:
        Path(f"/proc/self/fd/{copy}").write_bytes(Path(f"/proc/self/fd/{original}").read_bytes())
        return True

    monkeypatch.setattr(copying, "_clone", clone)
    assert copy_file(small, SourceFile("notes.txt", 5), tmp_path / "clone") == copied
    assert (tmp_path / "clone").read_text() == "12345"


def test_a_copy_that_does_not_fit_fails_also_where_only_the_end_of_its_last_block_is_missing(tmp_path: Path) -> None:
    nbytes = 2**20 + 200
    (tmp_path / "notes.txt").write_bytes(bytes(nbytes))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes - 100, limits[1]))  # write(2) then writes less than it was given
    try:
        with pytest.raises(OSError, match="File too large"):
            copy_file(tmp_path, SourceFile("notes.txt", nbytes), tmp_path / "part")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that can share blocks between files."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("needs mkfs.xfs (Debian's xfsprogs)")
    image, folder = tmp_path / "image", tmp_path / "xfs"
    with image.open("wb") as handle:
        handle.truncate(320 * 2**20)
    folder.mkdir()
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_file_system_with_reflinks_files_are_cloned(small: Path, xfs: Path) -> None:
    model = xfs / "model"
    shutil.copytree(small, model)
    (model / "tokenizer.json").write_bytes(bytes(range(256)) * 2**17)  # 32 MB
    before = shutil.disk_usage(xfs).used
    out = convert(model, xfs / "out")
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert shutil.disk_usage(xfs).used - before < 2**24
