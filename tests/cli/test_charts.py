"""Charts in a terminal: what they show, in any width, with and without colour and Unicode."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.reports import distance, verification

import quarkconv
from quarkconv.cli.out import console, plain
from quarkconv.cli.render.charts import size_bars, verification_charts
from quarkconv.cli.render.verification import render_verification
from quarkconv.report.series import ExpertMap, scale_ranges, weight_errors
from quarkconv.verify.layer_results import WeightError
from quarkconv.verify.results import NumbersResult, Verification

pytestmark = pytest.mark.long(15)

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
NAME = "qwen3_moe-quark0.13-f2f"


def drawn(numbers: NumbersResult, width: int, encoding: str = "utf-8", *, colour: bool = False) -> list[str]:
    """The lines of the charts in a terminal of that width and encoding."""
    file = TextIOWrapper(BytesIO(), encoding=encoding, errors="strict", newline="\n")
    terminal = Console(file=file, width=width, color_system="standard" if colour else None, force_terminal=colour)
    terminal.print(verification_charts(numbers, terminal.options))
    file.flush()
    assert isinstance(file.buffer, BytesIO)
    return file.buffer.getvalue().decode(encoding).splitlines()


def map_rows(lines: list[str], title: str) -> list[str]:
    """The marks of a heat map that has the whole width, a string for each row."""
    start = next(at for at, line in enumerate(lines) if line.strip().startswith(title)) + 1
    rows = []
    for line in lines[start:]:
        match = re.fullmatch(r"  +\d+(?:-\d+)?  (\S+) *", line)
        if match is None:
            break
        rows.append(match[1])
    return rows


def with_error(whole: Verification, layer: int, expert: int, error: float) -> NumbersResult:
    """The numbers with one weight of that error, and all others of 0.01."""
    experts = []
    for one in whole.numbers.experts:
        errors = [WeightError(0.01, 40.0, 0.0)] * len(one.load)
        weights = {role: tuple(errors) for role in ("gate", "up", "down")}
        if one.layer == layer:
            errors[expert] = WeightError(error, None, 0.0)
            weights["up"] = tuple(errors)
        experts.append(dataclasses.replace(one, weights=weights))
    return dataclasses.replace(whole.numbers, experts=tuple(experts))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (3, 8), (17, 60), (62, 256)])
def test_nothing_is_wider_than_the_terminal_or_cut_off(layers: int, experts: int, width: int, encoding: str) -> None:
    lines = drawn(verification(layers, experts).numbers, width, encoding)
    assert all(cell_len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "…" not in text
    assert "busiest: " in text
    assert len(lines) <= 28 + 2 * min(layers, 16)


def test_a_small_model_is_drawn_value_by_value() -> None:
    lines = drawn(with_error(verification(3, 8), 1, 2, 0.02), 80)
    start = next(at for at, line in enumerate(lines) if line.startswith("Experts"))
    assert lines[start].split("  ")[1].strip() == "a row for each layer, a mark for each expert"
    assert len(lines) < 24  # a screen
    assert map_rows(lines, "Weight error") == ["▁" * 8, "▁▁█▁▁▁▁▁", "▁" * 8]
    assert any("▁ 0.01  █ 0.02 in layer 1, expert 2" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80])
def test_the_worst_expert_of_a_large_model_is_seen(width: int) -> None:
    lines = drawn(with_error(verification(62, 256), 37, 200, 0.2), width)
    rows = map_rows(lines, "Weight error")
    (heading,) = (line for line in lines if line.startswith("Experts"))
    text = " ".join(lines)
    step = int(re.search(r"a row for 4 layers, a mark for (\d+) experts: the\s+largest of them", text)[1])  # type: ignore[index]
    assert heading
    assert len(rows) == 16
    assert {len(row) for row in rows} == {math.ceil(256 / step)}
    assert [(at, row.index("█")) for at, row in enumerate(rows) if "█" in row] == [(37 // 4, 200 // step)]
    assert any("█ 0.2 in layer 37, expert 200" in line for line in lines)


def test_in_a_wide_terminal_two_tall_maps_stand_side_by_side() -> None:
    lines = drawn(verification(62, 256).numbers, 120)
    assert any("Weight error" in line and "Load of each expert" in line for line in lines)
    assert len(lines) < 30


def test_an_error_that_is_nan_is_visible() -> None:
    lines = drawn(with_error(verification(62, 256), 37, 200, math.nan), 80)
    assert "".join(map_rows(lines, "Weight error")).count("?") == 1
    assert any("? not finite: 1" in line for line in lines)
    nothing = dataclasses.replace(verification(1, 2).numbers.experts[0], scale_min=(0.0, math.nan), weights={})
    numbers = dataclasses.replace(verification(1, 2).numbers, experts=(nothing,))
    assert map_rows(drawn(numbers, 60), "Range") == ["??"]
    assert scale_ranges(numbers.experts).described() == "Range of each expert's scales: no expert has a finite value."


def test_without_an_unquantized_model_scales_are_drawn() -> None:
    experts = tuple(
        dataclasses.replace(one, weights={}, scale_max=tuple(10.0 ** (at - 3) for at in range(8)))
        for one in verification(2, 8).numbers.experts
    )
    lines = drawn(dataclasses.replace(verification(2, 8).numbers, experts=experts), 60)
    assert map_rows(lines, "Range of each expert's scales (decades)") == ["".join(BLOCKS)] * 2


def test_load_is_drawn_from_zero() -> None:
    experts = tuple(dataclasses.replace(one, load=(5, 8, 8, 8)) for one in verification(2, 4).numbers.experts)
    lines = drawn(dataclasses.replace(verification(2, 4).numbers, experts=experts), 60)
    assert map_rows(lines, "Load") == ["▆███"] * 2
    assert any("busiest: 1.1 times its layer's mean" in line for line in lines)


def test_signal_to_noise_keeps_the_least() -> None:
    whole = verification(62, 4).numbers
    layers = [
        dataclasses.replace(
            one, dequantized=distance(0.1 if one.layer == 33 else 0.01), outliers=None, unquantized=None
        )
        for one in whole.layers
    ]
    lines = drawn(dataclasses.replace(whole, layers=tuple(layers)), 80)
    (row,) = (line for line in lines if "SNR" in line)
    assert "20.0 (layer 33) to 40.0 dB" in row
    (step,) = (int(found) for found in re.findall(r"a mark for (\d+) layers: the lowest of them", " ".join(lines)))
    marks = re.search(f"[{BLOCKS}]+", row)[0]  # type: ignore[index]
    assert marks == "".join("▁" if at == 33 // step else "█" for at in range(math.ceil(62 / step)))


def test_of_many_layers_the_wrong_and_the_noisiest_are_listed() -> None:
    whole = verification(62, 4)
    errors = {layer: 0.01 + 0.001 * layer for layer in range(62)} | {3: 0.5, 7: math.nan}
    layers = tuple(dataclasses.replace(one, dequantized=distance(errors[one.layer])) for one in whole.numbers.layers)
    result = dataclasses.replace(whole, numbers=dataclasses.replace(whole.numbers, layers=layers))
    terminal = Console(file=StringIO(), width=100)
    terminal.print(render_verification(result))
    assert isinstance(terminal.file, StringIO)
    text = terminal.file.getvalue()
    listed = [int(found) for found in re.findall(r"^ +(\d+) +4/4 ", text, re.MULTILINE)]
    assert listed == [3, 7, *range(48, 62)]
    assert "and 46 more with less noise (all with --json)" in text


def test_each_number_of_tokens_has_lines_of_its_own() -> None:
    whole = verification(3, 4).numbers
    both = (*whole.layers, *(dataclasses.replace(one, tokens=1024) for one in whole.layers))
    text = "\n".join(drawn(dataclasses.replace(whole, layers=both), 100))
    assert "SNR, dequantized, 64 tokens" in text
    assert "SNR, with outliers, 1024 tokens" in text


def test_colour_adds_nothing_that_has_to_be_seen() -> None:
    numbers = verification(3, 8).numbers
    coloured = drawn(numbers, 80, colour=True)
    assert any("\x1b[" in line for line in coloured)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == drawn(numbers, 80)


def test_sizes_have_bars() -> None:
    terminal = Console(file=StringIO(), width=60, color_system=None)
    terminal.print(size_bars([[("I8", 3_000_000), ("F32", 1_000_000)], [("routed experts", 4_000_000)]]))
    assert isinstance(terminal.file, StringIO)
    lines = [line.split() for line in terminal.file.getvalue().splitlines() if line.strip()]
    assert lines == [
        ["3", "MB", "75.0%", "━" * 12, "I8"], ["1", "MB", "25.0%", "━" * 4, "F32"],
        ["4", "MB", "100.0%", "━" * 16, "routed", "experts"],
    ]  # fmt: skip


def test_the_map_names_its_largest_value() -> None:
    chart = weight_errors(with_error(verification(3, 8), 1, 2, 0.02).experts)
    assert isinstance(chart, ExpertMap)
    assert "from 0.01 to 0.02, the largest in layer 1, expert 2" in chart.described()


def test_a_terminal_that_knows_only_ascii_sees_no_question_marks(checkpoints: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quarkconv", "verify", str(checkpoints(NAME)), "--device", "cpu"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "?" not in done.stdout
    assert "+ Verified" in done.stdout
    assert len(re.findall(f"^  [0-2]  [{re.escape(ASCII)}]{{8}}", done.stdout, re.MULTILINE)) >= 3


def test_what_an_encoding_does_not_have_gets_a_stand_in() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "is ✗✓漢".encode("ascii")
    assert plain(caught.value) == ("x+?", 6)


def test_a_dumb_terminal_keeps_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    assert console.__wrapped__().width == 60


def test_verify_shows_the_charts_and_bytes_alone_do_not(checkpoints: Callable[[str], Path]) -> None:
    def shown(stages: list[str]) -> str:
        result = quarkconv.verify_checkpoint(checkpoints(NAME), device="cpu", stages=stages)
        terminal = Console(file=StringIO(), width=100)
        terminal.print(render_verification(result))
        assert isinstance(terminal.file, StringIO)
        return terminal.file.getvalue()

    assert "Load of each expert" in shown(["numbers"])
    assert "Experts" not in shown(["bytes"])
