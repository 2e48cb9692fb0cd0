"""Small charts in a terminal.

A value is one mark, whose height shows it without colour; encodings without blocks get marks of growing weight. If
there are more values than columns, several share a mark, and the heading says how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from rich.columns import Columns
from rich.console import ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quarkconv.report.series import (
    ExpertMap,
    Histogram,
    Noise,
    expert_load,
    scale_distribution,
    scale_ranges,
    signal_to_noise,
    weight_errors,
)
from quarkconv.text import size
from quarkconv.verify.results import NumbersResult

_T = TypeVar("_T")

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_ASCII: Final = ".:-=+*#@"
_UNKNOWN: Final = "?"
_LINE_STYLES: Final = ("cyan",)
_MAP_STYLES: Final = ("blue", "cyan", "green", "yellow")
"""From the lowest mark to the highest, in the terminal's own palette; no red, since high is not wrong."""
_INDENT: Final = "  "
_BAR: Final = 16
_ROWS: Final = 16
"""Most rows of a heat map."""
_BETWEEN: Final = 2
"""Columns between two heat maps."""
_FLAT: Final = 4
"""Up to so many rows, maps are drawn one below the other at full width."""
_WIDE: Final = 100
"""Width of a terminal where half is enough for a map."""
_LEAST_ROOM: Final = 8
"""Fewest columns for marks; words beside them wrap first."""


def verification_charts(numbers: NumbersResult, options: ConsoleOptions) -> RenderableType:
    """Signal to noise, scales, weight errors and load of what was verified.

    Args:
        numbers: of at least one layer.
        options: width and encoding of the terminal.
    """
    found = (weight_errors(numbers.experts) or scale_ranges(numbers.experts), expert_load(numbers.experts))
    maps = expert_maps([chart for chart in found if chart is not None], options)
    return Group(*_lines(numbers, options), "", *maps, "")


def size_bars(groups: Iterable[Sequence[tuple[str, int]]]) -> RenderableType:
    """Sizes with bars for their shares; groups stand side by side in a wide terminal."""
    tables = []
    for sizes in groups:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(justify="right", min_width=len(_INDENT) + len("9.99 MB"))
        table.add_column(justify="right", min_width=len("99.9%"))
        table.add_column(min_width=_BAR)
        total = sum(nbytes for _, nbytes in sizes) or 1
        for name, nbytes in sizes:
            # A full bar of that length: the rest of a partly filled one could be mistaken for it.
            bar = ProgressBar(1, 1, max(round(nbytes / total * _BAR), 1), finished_style=_LINE_STYLES[0])
            table.add_row(size(nbytes), f"{nbytes / total:.1%}", bar, name)
        tables.append(table)
    return Columns(tables, padding=(1, 1, 1, 0))


class _Line(NamedTuple):
    """A value for each layer, between a name and words."""

    name: str
    values: tuple[float | None, ...]
    words: str


def _lines(numbers: NumbersResult, options: ConsoleOptions) -> Iterator[RenderableType]:
    """Signal to noise by layer and the distribution of scales, a line for each."""
    noise = [one for one in signal_to_noise(numbers.layers) if len(one.layers) > 1]
    snr = [_snr(one, name, several=len(noise) > 1) for one in noise for name in one.lines]
    scales = scale_distribution(numbers.experts)
    spread = _spread(scales)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    names, words = ["weight scales", *(line.name for line in snr)], [spread, *(line.words for line in snr)]
    room = max(options.max_width - len(_INDENT) - max(map(len, names)) - max(map(len, words)) - 4, _LEAST_ROOM)
    step = _step(max((len(line.values) for line in snr), default=1), room)
    known = [value for line in snr for value in line.values if value is not None]
    for line in snr:
        few = [_least(part) for part in _parts(line.values, step)]
        table.add_row(_INDENT + line.name, _marks(few, min(known), max(known), options), line.words)
    counts = [sum(part) or None for part in _parts(scales.counts, _step(len(scales.counts), room))]
    top = max((count for count in counts if count is not None), default=1)
    table.add_row(_INDENT + "weight scales", _marks(counts, 0, top, options), spread)
    key = "" if not snr else "a mark for each layer" if step == 1 else f"a mark for {step} layers: the lowest of them"
    yield _heading("Noise and scales" if snr else "Scales", key)
    yield table


def _snr(noise: Noise, name: str, *, several: bool) -> _Line:
    values = noise.lines[name]
    value, layer = noise.lowest(name)
    high = max(value for value in values if value is not None)
    tokens = f", {noise.tokens} tokens" if several else ""
    words = f"{value:.1f} (layer {layer}) to {high:.1f} dB" if value < high else f"{value:.1f} dB"
    return _Line(f"SNR, {name}{tokens}", values, words)


def _spread(scales: Histogram) -> str:
    """Range of the scales, and the middle of the fullest bin."""
    if not any(scales.counts):
        return "none in the bins"
    peak = scales.counts.index(max(scales.counts))
    middle = (scales.edges[peak] + scales.edges[peak + 1]) / 2
    return f"{10 ** scales.edges[0]:.1e} to {10 ** scales.edges[-1]:.1e}, peak {10**middle:.1e}"


def expert_maps(charts: Sequence[ExpertMap], options: ConsoleOptions) -> Iterator[RenderableType]:
    """Heat maps of the same layers, side by side in a wide terminal.

    Args:
        charts: at least one.
        options: width and encoding of the terminal.
    """
    numbers = charts[0].layers
    columns = max(len(row) for chart in charts for row in chart.cells)
    layers = _step(len(numbers), _ROWS)
    names = ["-".join(dict.fromkeys((str(part[0]), str(part[-1])))) for part in _parts(numbers, layers)]
    room = options.max_width
    if len(charts) > 1 and len(names) > _FLAT and room >= _WIDE:
        room = (room - _BETWEEN) // len(charts)
    room = max(room - len(_INDENT) - max(map(len, names)) - 2, _LEAST_ROOM)
    step = _step(columns, room)
    key = "a row for each layer, a mark for each expert"
    if layers > 1 or step > 1:
        key = f"a row for {_each(layers, 'layer')}, a mark for {_each(step, 'expert')}: the largest of them"
    yield _heading("Experts", key)
    drawn = [_heat_map(chart, names, (layers, step), options) for chart in charts]
    yield Columns(drawn, padding=(1, _BETWEEN, 1, 0))


def _heat_map(chart: ExpertMap, names: list[str], steps: tuple[int, int], options: ConsoleOptions) -> RenderableType:
    """Title, rows of marks, legend."""
    lines: list[RenderableType] = [Text.assemble((chart.title, "bold"), (f" ({chart.unit})", "dim"))]
    rows = [
        [
            _largest([value for row in layers for value in row[at : at + steps[1]]])
            for at in range(0, max(map(len, layers)), steps[1])
        ]
        for layers in _parts(chart.cells, steps[0])
    ]
    known = [value for row in rows for value in row if value is not None] or [0.0]
    low = min(known) if chart.floor is None else chart.floor
    for name, row in zip(names, rows, strict=True):
        marks = _marks(row, low, max(known), options, unknown=_UNKNOWN, styles=_MAP_STYLES)
        lines.append(Text.assemble((f"{name:>{max(map(len, names))}}", "dim"), "  ", marks))
    lines += [Text(words, style="dim") for words in (_legend(chart, low, options), chart.note) if words]
    return Padding(Group(*lines), (0, 0, 0, len(_INDENT)))


def _legend(chart: ExpertMap, low: float, options: ConsoleOptions) -> str:
    """Values of the lowest and the highest mark, and where the highest is."""
    ramp = _ramp(options)
    words = []
    if chart.extremes is not None:
        high = chart.extremes[1]
        words.append(f"{ramp[0]} {low:{chart.form}}")
        if high.value > low:
            words.append(f"{ramp[-1]} {high.value:{chart.form}} in layer {high.layer}, expert {high.expert}")
    if chart.unknown:
        words.append(f"{_UNKNOWN} not finite: {chart.unknown:,}")
    return _INDENT.join(words)


def _heading(name: str, words: str) -> RenderableType:
    """A name, and words that wrap beside it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(Text(name, style="bold", no_wrap=True), Text(words, style="dim"))
    return table


def _marks(
    values: Sequence[float | None],
    low: float,
    high: float,
    options: ConsoleOptions,
    *,
    unknown: str = " ",
    styles: Sequence[str] = _LINE_STYLES,
) -> Text:
    """A mark for each value, its height the value's place between low and high."""
    ramp = _ramp(options)
    text = Text()
    for value in values:
        if value is None:
            text.append(unknown)
            continue
        level = min(int((value - low) / (high - low) * len(ramp)), len(ramp) - 1) if high > low else 0
        text.append(ramp[level], style=styles[level * len(styles) // len(ramp)])
    return text


def _ramp(options: ConsoleOptions) -> str:
    return _ASCII if options.ascii_only else _BLOCKS


def _step(count: int, room: int) -> int:
    """How many values share a mark, for so many values in that many columns."""
    return max(-(-count // room), 1)


def _parts(values: Sequence[_T], step: int) -> list[Sequence[_T]]:
    return [values[at : at + step] for at in range(0, len(values), step)]


def _least(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _largest(values: Sequence[float | None]) -> float | None:
    """The largest; None if any is unknown, which is worse than any value."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) and known else None


def _each(count: int, noun: str) -> str:
    return f"each {noun}" if count == 1 else f"{count} {noun}s"
