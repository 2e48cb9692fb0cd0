"""Files that a command writes beside its result replace nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from quarkconv.errors import UsageError, WriteError
from quarkconv.files.written_file import require_writable

MARK = b"<title>quarkconv "


@pytest.mark.parametrize("held", [None, b"", b"<html><title>quarkconv inspect model</title>"])
def test_a_new_file_an_empty_one_and_an_earlier_result_are_written(held: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    if held is not None:
        path.write_bytes(held)
    require_writable("--report", path, MARK)
    assert not path.exists() or path.read_bytes() == held


@pytest.mark.parametrize("held", [b"{}", b"\0" * 5000, b"x" * 2000 + MARK])
def test_a_file_of_another_kind_is_refused(held: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(held)
    with pytest.raises(UsageError, match="--report would overwrite an unrelated file") as caught:
        require_writable("--report", path, MARK)
    assert caught.value.file == str(path)


def test_a_link_is_refused_though_it_leads_to_an_earlier_result(tmp_path: Path) -> None:
    """Replacing /dev/stdout, which is a link, would take standard output from every program of the machine."""
    (tmp_path / "earlier.html").write_bytes(MARK)
    (tmp_path / "link").symlink_to("earlier.html")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("link", "dangling"):
        with pytest.raises(UsageError, match="would overwrite an unrelated file"):
            require_writable("--report", tmp_path / name, MARK)


def test_devices_folders_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would overwrite an unrelated file"):
        require_writable("--report", "/dev/null", MARK)
    for path in (tmp_path, tmp_path / "no folder" / "report.html"):
        with pytest.raises(WriteError):
            require_writable("--report", path, MARK)
    with pytest.raises(UsageError, match="--record is empty"):
        require_writable("--record", "", MARK)
