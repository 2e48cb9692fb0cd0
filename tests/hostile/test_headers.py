"""Headers that lie: whatever ``read_header`` refuses, the commands say in one sentence, and write nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import stored_tensors
from support.hostile import corrupted, judge, listing, with_header
from support.model import SECOND
from support.program import run_cli
from support.raw import entry, raw_file

from quarkconv import inspect_checkpoint

ONE = entry("I8", [1], 0, 1)
KEY = '"shape":[1],"data_offsets":[0,1]'
REFUSED = {
    "no bytes": lambda folder: (folder / SECOND).write_bytes(b""),
    "length 0": lambda folder: (folder / SECOND).write_bytes(struct.pack("<Q", 0)),
    "length beyond the file": with_header("{}", length=3),
    "length 2^63": with_header("{}", length=2**63),
    "length of 100 MB and one": with_header("{}", length=100_000_001),
    "not UTF-8": with_header(b'{"\xff":1}'),
    "not JSON": with_header("{safetensors}"),
    "a list": with_header("[]"),
    "a name twice": with_header(f'{{"a":{json.dumps(ONE)},"a":{json.dumps(ONE)}}}', b"1"),
    "nested 100,000 deep": with_header('{"a":' + "[" * 100_000),
    "an entry nested 950 deep": with_header('{"a":' + "[" * 950 + "]" * 950 + "}", b"1"),
    "an entry nested 990 deep": with_header('{"a":' + "[" * 990 + "]" * 990 + "}", b"1"),
    "NaN": with_header('{"a":{"dtype":"I8","shape":[NaN],"data_offsets":[0,1]}}', b"1"),
    "an integer of 5,000 digits": with_header('{"a":{"dtype":"I8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}'),
    "a negative shape": with_header({"a": entry("I8", [-1], 0, 1)}, b"1"),
    "a fractional shape": with_header({"a": entry("I8", [0.5, 2], 0, 1)}, b"1"),
    "a shape that overflows": with_header({"a": entry("I8", [2**32, 2**32], 0, 0)}),
    "a shape that overflows before a 0": with_header({"a": entry("I8", [2**63, 2, 0], 0, 0)}),
    "an unknown dtype": with_header(f'{{"a":{{"dtype":"I2",{KEY}}}}}', b"1"),
    "a dtype of a megabyte": with_header(f'{{"a":{{"dtype":"{"I" * 2**20}",{KEY}}}}}', b"1"),
    "half a byte": with_header({"a": entry("F4", [1], 0, 1)}, b"1"),
    "offsets that overlap": with_header({"a": entry("I8", [2], 0, 2), "b": entry("I8", [2], 1, 3)}, b"123"),
    "offsets with a hole": with_header({"a": entry("I8", [1], 0, 1), "b": entry("I8", [1], 2, 3)}, b"123"),
    "offsets that run backwards": with_header({"a": entry("I8", [1], 1, 0)}, b"1"),
    "metadata of numbers": with_header({"__metadata__": {"a": 1}}),
    "metadata of half a gigabyte, it says": with_header({"__metadata__": {"a": ["x"] * 100_000}}),
    "a name of a megabyte": with_header({"x" * 2**20: ONE}, b"1"),
    "a million dimensions": with_header({"a": entry("I8", [1] * 1_000_000, 0, 1)}, b"1"),
    "bytes after the data": with_header({"a": ONE}, b"12"),
}
TRUNCATED = {
    "offsets past the end": with_header({"a": entry("I8", [3], 0, 3)}, b"12"),
    "offsets far past the end": with_header({"a": entry("I8", [2**60], 0, 2**60)}, b"12"),
}
SHORT = ("no bytes", "length beyond the file")


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_breaks_a_rule_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge(corrupted(tmp_path / "model", REFUSED[name]), capsys)
    assert (verdict.inspect, verdict.codes) == (1, ["shard-truncated" if name in SHORT else "header-invalid"])
    assert (verdict.convert, verdict.error["code"], verdict.error["file"]) == (
        3,
        verdict.codes[0],
        str(tmp_path / "model" / SECOND),
    )


@pytest.mark.parametrize("name", TRUNCATED)
def test_data_beyond_the_end_of_the_file_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = judge(corrupted(tmp_path / "model", TRUNCATED[name]), capsys)
    assert verdict.inspect == 1
    assert "shard-truncated" in verdict.codes
    assert (verdict.convert, verdict.error["exit_code"]) == (3, 3)


NAMES = {
    "NUL": "model.layers.0.mlp.gate\0.weight",
    "line ends": "model.layers.0\r\nerror: all is well.weight",
    "terminal escapes": "\x1b]0;owned\x07\x1b[2J.weight",
    "terminal escapes of one byte": "\x9b2J.weight",
    "a mark that turns text around": "model.\u202egate.weight",
    "DEL": "model.\x7f.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_tensor_name_is_reported_escaped(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = judge(corrupted(tmp_path / "model", add_tensor(NAMES[name])), capsys)
    assert (verdict.inspect, verdict.codes) == (1, ["tensor-name"])
    assert (verdict.convert, verdict.error["code"]) == (3, "tensor-name")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini"])
def test_a_tensor_name_that_looks_like_a_path_stays_a_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrupted(tmp_path / "model", add_tensor(name))
    before = listing(tmp_path)
    findings = inspect_checkpoint(folder).findings
    outside = [] if "." in name else [("tensor-unrecognised", "warning", name)]  # in no module
    assert [(item.code, item.severity, item.subject) for item in findings] == [*outside, ("tensor-name", "info", name)]
    assert listing(tmp_path) == before
    assert run_cli(capsys, "convert", folder, "--to", "fused-int8", "--out", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert name in dict(stored_kinds(tmp_path / "out"))


def stored_kinds(folder: Path) -> Iterator[tuple[str, str]]:
    return ((name, dtype) for name, dtype, _ in stored_tensors(folder))


def add_tensor(name: str) -> Callable[[Path], object]:
    """Adds a byte under a name to the second shard, and the name to the index."""

    def corrupt(folder: Path) -> None:
        raw = (folder / SECOND).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        end = max(item["data_offsets"][1] for key, item in header.items() if key != "__metadata__")
        header[name] = entry("U8", [1], end, end + 1)
        (folder / SECOND).write_bytes(raw_file(header, raw[8 + length :] + b"1"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][name] = SECOND
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return corrupt
