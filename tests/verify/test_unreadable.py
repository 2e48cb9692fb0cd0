"""Disks that fail while a checkpoint is verified: the file is named, and nothing is called a mismatch."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint

import quarkconv
from quarkconv.errors import SourceError
from quarkconv.verify import verify
from quarkconv.verify.checkpoints import open_checkpoints


def fail_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reads of a file fail as those of a broken disk."""

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def read(descriptor: int, *args: Any) -> Any:
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(descriptor, *args)

        return read

    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))


@pytest.mark.parametrize("stages", [["bytes"], ["bytes", "numbers"]], ids="+".join)
@pytest.mark.parametrize("name", ["source/model-00001-of-00002.safetensors", "out/model-00001-of-00001.safetensors",
                                  "out/vocabulary.txt"])  # fmt: skip
def test_the_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stages: list[str]
) -> None:
    source = make_checkpoint(tmp_path / "source", layers=1)
    (source / "vocabulary.txt").write_text("a b c")
    out = quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "out").output

    def open_and_fail(*args: Any) -> Any:
        found = open_checkpoints(*args)
        fail_at(tmp_path / name, monkeypatch)
        return found

    monkeypatch.setattr(verify, "open_checkpoints", open_and_fail)
    with pytest.raises(SourceError) as caught:
        quarkconv.verify_checkpoint(out, source, "cpu", stages=stages)
    assert caught.value.file == str(tmp_path / name)
    assert caught.value.found == os.strerror(errno.EIO)
