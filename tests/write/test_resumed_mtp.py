"""A conversion with layers of multi-token prediction resumes to the same bytes, and only as the same conversion."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

import pytest
from support.conversions import assert_unfinished
from support.program import snapshot
from support.reported import with_mtp

import quarkconv
from quarkconv.errors import UsageError, WriteError

pytestmark = pytest.mark.long(10)

SHARD: Final = 200
"""Bytes of a shard: several of them."""
LATER: Final = (1, 6)
"""How many writes succeed before the disk is full."""


def convert(source: Path, target: str, out: Path, mtp: str) -> Path:
    return quarkconv.convert_checkpoint(source, target, out, mtp=mtp, max_shard_size=SHARD, jobs=1).output


def interrupted(source: Path, target: str, out: Path, mtp: str, after: int, patch: pytest.MonkeyPatch) -> None:
    """Begin a conversion whose disk is full after some writes."""
    pwrite, left = os.pwrite, iter(range(after))

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    with patch.context() as context:
        context.setattr(os, "pwrite", failing)
        with pytest.raises(WriteError):
            convert(source, target, out, mtp)
    assert_unfinished(out)


@pytest.mark.parametrize("after", LATER)
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("mtp", ["keep", "drop", "quantize"])
@pytest.mark.parametrize("target", ["fused-int8", "quark"])
def test_a_resumed_conversion_is_the_same_as_an_undisturbed_one(
    target: str, mtp: str, layout: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_mtp(layout).write(tmp_path / "source")
    expected = snapshot(convert(source, target, tmp_path / "undisturbed", mtp))
    interrupted(source, target, tmp_path / "out", mtp, after, monkeypatch)
    out = convert(source, target, tmp_path / "out", mtp)
    assert snapshot(out) == expected
    assert quarkconv.verify_checkpoint(out, device="cpu", tokens=2).problems == ()


@pytest.mark.parametrize(("begun", "requested"), [("keep", "drop"), ("drop", "quantize"), ("quantize", "keep")])
def test_another_choice_does_not_resume(
    begun: str, requested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_mtp("split").write(tmp_path / "source")
    interrupted(source, "fused-int8", tmp_path / "out", begun, 3, monkeypatch)
    with pytest.raises(UsageError, match="--mtp"):
        convert(source, "fused-int8", tmp_path / "out", requested)
    assert_unfinished(tmp_path / "out")
