"""``quarkconv engines``: every row of the table, for people and as JSON."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from support.commands import Run

ROWS = tomllib.loads((Path(__file__).parents[2] / "quarkconv" / "inspection" / "engines.toml").read_text())


def test_json_has_every_row_with_evidence_and_date(command: Run) -> None:
    result = command("engines", "--json")
    assert (result.code, result.err) == (0, "")
    value = result.json
    assert value["schema"] == "quarkconv.engines/1"
    (rows,) = (item for item in ROWS.values() if isinstance(item, list))
    assert len(value["engines"]) == len(rows)
    for row in value["engines"]:
        assert all(isinstance(row[key], str) for key in ("engine", "version", "as", "verdict", "note"))
        assert row["evidence"]
        assert re.fullmatch(r"(20\d\d-\d\d-\d\d)?", row["checked"])  # empty: not recorded


def test_people_see_every_engine_with_its_evidence(command: Run) -> None:
    result = command("engines")
    assert (result.code, result.err) == (0, "")
    rows = command("engines", "--json").json["engines"]
    for engine in {row["engine"] for row in rows}:
        assert engine.lower() in result.out.lower()
    for verdict in {row["verdict"] for row in rows}:
        assert verdict in result.out
    assert rows[0]["evidence"].split()[0] in result.out


def test_an_argument_is_wrong_usage(command: Run) -> None:
    assert command("engines", "vllm").code == 2
