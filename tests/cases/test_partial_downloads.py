"""Models that were not downloaded completely, or whose files were edited in another encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from support.model import FIRST, SECOND, Model
from support.moe_model import INDEX
from support.reported import codes, finding, refusal

from quarkconv import inspect_checkpoint
from quarkconv.targets import TARGETS

POINTER: Final = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 4990120144\n"
)


@pytest.mark.parametrize(
    ("file", "code"), [("config.json", "config-invalid"), (INDEX, "index-invalid"), (FIRST, "header-invalid")]
)
def test_a_pointer_of_git_lfs_is_called_so_in_every_file(file: str, code: str, tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    (source / file).write_text(POINTER)
    found = finding(source, code)
    assert "Git LFS pointer" in found.message
    assert "git lfs pull" in found.hint
    assert {refusal(source, target).exit_code for target in TARGETS} == {3}


def test_a_config_that_cannot_be_read_is_not_said_to_lack_a_scheme(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    (source / "config.json").write_text("{")
    assert codes(source) == {"config-invalid": "error"}


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>403</html>", '{"error":"Access denied"}', "Entry not found"])
def test_a_page_that_was_saved_as_a_shard_is_called_a_text(page: str, tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    (source / SECOND).write_text(page)
    found = finding(source, "header-invalid")
    assert f"a text of {len(page)} bytes that starts with {page[:8]!r}" in found.message


@pytest.mark.parametrize("lost", [FIRST, SECOND])
def test_a_shard_that_is_missing_without_an_index_is_named(lost: str, tmp_path: Path) -> None:
    """Here, each shard has a whole layer: without the names of the files, the rest looks like a smaller model."""
    source = Model().write(tmp_path)
    (source / INDEX).unlink()
    (source / lost).unlink()
    assert finding(source, "shard-missing").subject == lost
    for target in TARGETS:
        error = refusal(source, target)
        assert (error.exit_code, Path(str(error.file)).name) == (3, lost)


def test_shards_that_are_numbered_from_zero_are_complete(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    (source / INDEX).unlink()
    (source / FIRST).rename(source / FIRST.replace("00001-of", "00000-of"))
    (source / SECOND).rename(source / SECOND.replace("00002-of", "00001-of"))
    assert codes(source) == {}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("file", "code"), [("config.json", "config-invalid"), (INDEX, "index-invalid")])
def test_a_file_that_engines_cannot_decode_is_damaged(file: str, code: str, encoding: str, tmp_path: Path) -> None:
    """transformers 5.24 (configuration_utils.py) and vLLM 0.33 (weight_utils.py) read both as UTF-8 without a mark."""
    source = Model().write(tmp_path)
    (source / file).write_text((source / file).read_text(), encoding=encoding)
    assert "byte order mark" in finding(source, code).message
    assert refusal(source, "fused-int8").exit_code == 3


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_config_that_cannot_be_read_is_not_said_to_lack_a_key(content: str | None, tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    texts = inspect_checkpoint(source).not_checked
    assert any(text.endswith("(config.json is missing, empty, or cannot be read)") for text in texts)
    assert not any("model_type" in text for text in texts)
