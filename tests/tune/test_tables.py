"""Tables as engines read them, the record beside them, and those that quarkconv brings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quarkconv import UnsupportedError, UsageError
from quarkconv.tune.grid import Tile
from quarkconv.tune.shapes import whole
from quarkconv.tune.tables import MEASURED, SHIPPED, Timing, dump_table, parse_table, record, shipped_folder

ROOT = Path(__file__).parents[2]
TIMINGS = {
    64: Timing(Tile(16, 64, 256, 1, 4, 4), 183.4, 170.26),
    1: Timing(Tile(16, 64, 128, 1, 4, 5), 27.0, 26.0),
}
HEAD = {"engine": "vllm 0.33.0", "device": "NVIDIA H200", "date": "2026-11-28"}


def test_a_table_has_the_keys_of_the_kernel() -> None:
    entries = json.loads(dump_table(TIMINGS))
    assert list(entries) == ["1", "64"]
    assert entries["1"] == {
        "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 5
    }  # fmt: skip
    assert parse_table(dump_table(TIMINGS)) == {tokens: timing.tile for tokens, timing in TIMINGS.items()}


@pytest.mark.parametrize("text", ["[]", '{"x": {}}', '{"1": {"BLOCK_SIZE_M": 16}}'])
def test_an_invalid_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|invalid literal"):
        parse_table(text)


def test_the_record_keeps_other_tables(tmp_path: Path) -> None:
    shape = whole(128, 8, 2048, 768)
    (tmp_path / MEASURED).write_text(record(tmp_path, "a.json", HEAD, {shape: TIMINGS}))
    (tmp_path / MEASURED).write_text(record(tmp_path, "b.json", HEAD, {shape: {}}))
    found = json.loads((tmp_path / MEASURED).read_text())
    assert list(found) == ["a.json", "b.json"]
    assert found["a.json"] == [{
        **HEAD, "experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768,
        "tokens": {"1": {"default_us": 27.0, "tuned_us": 26.0}, "64": {"default_us": 183.4, "tuned_us": 170.3}},
    }]  # fmt: skip


def test_the_record_has_each_shape_of_a_table(tmp_path: Path) -> None:
    wide = {64: Timing(TIMINGS[64].tile, 300.0, 200.0)}
    timings = {whole(128, 8, 4096, 768): wide, whole(128, 8, 2048, 768): TIMINGS}
    [found] = json.loads(record(tmp_path, "a.json", HEAD, timings)).values()
    assert [entry["hidden"] for entry in found] == [2048, 4096]
    assert found[1]["tokens"] == {"64": {"default_us": 300.0, "tuned_us": 200.0}}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_another_file_of_that_name_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / MEASURED).write_text(text)
    with pytest.raises(UsageError, match="unrelated file of that name"):
        record(tmp_path, "a.json", HEAD, {whole(8, 2, 64, 64): TIMINGS})


def test_an_engine_without_tables_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="has no tables for nothing"):
        shipped_folder("nothing")


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("E=*.json")), ids=lambda path: str(path.relative_to(SHIPPED)))
def test_a_shipped_table_is_read_and_recorded(path: Path) -> None:
    tiles = parse_table(path.read_text())
    folder = SHIPPED / path.relative_to(SHIPPED).parts[0]
    named = re.match(r"E=(\d+),N=(\d+),device_name=([^,]+)", path.stem)
    assert named
    for entry in json.loads((folder / MEASURED).read_text())[str(path.relative_to(folder))]:
        assert set(entry["tokens"]) == set(map(str, tiles))
        assert (int(named[1]), int(named[2])) == (entry["experts"], entry["intermediate"])
        assert named[3] in entry["device"].replace(" ", "_")
        for times in entry["tokens"].values():
            assert 0 < times["tuned_us"] <= times["default_us"]


def test_tables_for_an_h100_are_what_the_benchmark_measured() -> None:
    """`quarkconv tune` has not run on one."""
    result = json.loads((ROOT / "benchmarks" / "results" / "moe-int8-nvidia-h100-80gb-hbm3.json").read_text())
    rows = {(row["experts"], row["intermediate"], str(row["tokens"])): row for row in result["rows"]}
    records = json.loads((SHIPPED / "vllm" / MEASURED).read_text())
    found = 0
    for name, [entry, *others] in records.items():
        if entry["by"] == "quarkconv tune":
            continue
        assert not others
        assert (entry["by"], entry["device"]) == ("benchmarks/moe_int8.py", result["device"])
        tiles = parse_table((SHIPPED / "vllm" / name).read_text())
        for tokens, times in entry["tokens"].items():
            row, tile = rows[entry["experts"], entry["intermediate"], tokens], tiles[int(tokens)]
            text = f"{tile.block_m}x{tile.block_n}x{tile.block_k} group {tile.group_m} warps {tile.num_warps} "
            assert row["vllm_tuned"] in ("default", f"{text}stages {tile.num_stages}")
            assert times == {key: round(row[f"vllm_{key}"], 1) for key in ("default_us", "tuned_us")}
            found += 1
    assert found == 25


def test_every_record_has_its_table() -> None:
    for measured in SHIPPED.rglob(MEASURED):
        assert all((measured.parent / name).is_file() for name in json.loads(measured.read_text()))
