"""Reads that return less than was asked for, as file systems in user space do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.program import snapshot

import quarkconv
from quarkconv.files.base import Range
from quarkconv.files.local import LocalFiles


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system returns at most 1,000 bytes at a time."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, nbytes, start: pread(descriptor, min(nbytes, 1000), start))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("start", "nbytes"), [(0, 5000), (10, 990), (4000, 5000), (5000, 10), (6000, 1), (0, 0)])
def test_a_range_is_read_whole_or_to_the_end_of_the_file(tmp_path: Path, start: int, nbytes: int) -> None:
    data = os.urandom(5000)
    (tmp_path / "file").write_bytes(data)
    files = LocalFiles(tmp_path)
    expected = data[start : start + nbytes]
    assert files.read("file", start, nbytes) == expected
    assert list(files.read_many([Range("file", start, start + nbytes)])) == [expected]


def test_a_checkpoint_is_described_and_converted_alike(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = make_checkpoint(tmp_path / "model", layers=2, zero_points=True)
    expected = snapshot(quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "whole").output)
    request.getfixturevalue("short")
    out = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "short").output
    assert snapshot(out) == expected
    assert quarkconv.verify_checkpoint(out, model, device="cpu").ok
