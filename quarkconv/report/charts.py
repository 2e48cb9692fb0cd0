"""Charts as inline SVG, drawn by matplotlib.

Text stays text: it can be read aloud, searched and copied. Ink is ``currentColor`` and series are CSS variables, so one
chart serves light pages, dark pages and paper.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Final

from quarkconv.report.series import ExpertMap, Extreme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK: Final = "#010203"
_SERIES: Final = ("#010204", "#010205", "#010206", "#010207")
_WIDTH: Final = 8.0
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quarkconv",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
_numbers = itertools.count(1)


def line_chart(
    title: str,
    layers: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    *,
    y_label: str,
    log: bool = False,
    bound: float | None = None,
    described: str,
) -> str:
    """Lines over the layers with a mark at each; None is a gap.

    Args:
        title: of the chart.
        layers: their numbers.
        series: name -> a value for each layer.
        y_label: of the y axis.
        log: whether the y axis is logarithmic; zeros are gaps then.
        bound: drawn as a dashed line.
        described: the chart in words, for screen readers.
    """
    with _axes(title, described, height=2.6) as (axes, out):
        for colour, mark, (name, values) in zip(_SERIES, "osD^", series.items(), strict=False):
            shown = [float("nan") if value is None or (log and value <= 0) else value for value in values]
            axes.plot(layers, shown, marker=mark, markersize=3.5, linewidth=1.2, color=colour, label=name)
        if bound is not None:
            axes.axhline(bound, color=_INK, linestyle="--", linewidth=1, label=f"bound {bound:.3g}")
        if log:
            axes.set_yscale("log", nonpositive="mask")
        axes.set_xlim(min(layers, default=0) - 0.5, max(layers, default=0) + 0.5)
        _whole_numbers(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel(y_label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return out[0]


def bar_chart(
    title: str, names: Sequence[str], values: Sequence[float], *, x_label: str, y_label: str, described: str
) -> str:
    """Adjacent bars; values in bytes, ``B``, get decimal prefixes."""
    from matplotlib.ticker import EngFormatter

    with _axes(title, described, height=2.4) as (axes, out):
        axes.bar(range(len(names)), values, color=_SERIES[0])
        step = max(1, len(names) // 12)
        axes.set_xticks(range(0, len(names), step), [names[at] for at in range(0, len(names), step)])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(x_label)
        if y_label == "B":
            axes.yaxis.set_major_formatter(EngFormatter(unit=y_label))
        else:
            axes.set_ylabel(y_label)
    return out[0]


def heat_map(chart: ExpertMap) -> str:
    """A colour for each expert (column) of each layer (row)."""
    columns = max(map(len, chart.cells), default=1)
    # Two maps of a large model fit a page of paper.
    height = min(max(1.2 + 0.06 * len(chart.layers), 1.8), 4.2)
    filled = [
        [float("nan") if value is None else value for value in row] + [float("nan")] * (columns - len(row))
        for row in chart.cells
    ]
    title = "; ".join(filter(None, (chart.title, chart.note, _largest(chart))))
    with _axes(title, chart.described(), height=height) as (axes, out):
        # "none" embeds a pixel for each value, which viewers enlarge with sharp edges; "nearest" resamples at 72 dpi.
        image = axes.imshow(filled, aspect="auto", interpolation="none", cmap="viridis", vmin=chart.floor)
        if chart.extremes is not None and chart.extremes[0].value < chart.extremes[1].value:
            _ring(axes, chart, chart.extremes[1])
        step = max(1, -(-len(chart.layers) // 16))
        axes.set_yticks(range(0, len(chart.layers), step), [str(layer) for layer in chart.layers[::step]])
        axes.grid(visible=False)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(chart.unit)
        bar.outline.set_edgecolor(_INK)
        step = 2 ** max(0, (columns // 12).bit_length())
        axes.set_xticks(range(0, columns, step if columns > 16 else 1))
    return out[0]


def _largest(chart: ExpertMap) -> str:
    """Where the largest value is; the map circles it."""
    if chart.extremes is None or chart.extremes[0].value == chart.extremes[1].value:
        return ""
    value, layer, expert = chart.extremes[1]
    return f"largest: {value:{chart.form}} in layer {layer}, expert {expert} (circled)"


def _ring(axes: Axes, chart: ExpertMap, extreme: Extreme) -> None:
    """Circle a cell: one of 62 x 256 is too small to stand out by its colour."""
    row = chart.layers.index(extreme.layer)
    axes.plot([extreme.expert], [row], marker="o", markersize=9, fillstyle="none", color=_INK, clip_on=False)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


@contextmanager
def _axes(title: str, described: str, *, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw in; when the block ends, the list holds the figure as HTML."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out: list[str] = []
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure.add_subplot(), out
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    out.append(_embedded(drawn.getvalue(), title, described))


def _embedded(svg: str, title: str, described: str) -> str:
    """An SVG document as a figure: in the page's colours, with ids unique to it, and described for screen readers."""
    svg = svg[svg.index("<svg") :]
    prefix = f"c{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = escape(described, quote=True).replace("\\", r"\\")
    opening = rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" aria-label="{label}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)
    svg = svg.replace(_INK, "currentColor")
    for number, colour in enumerate(_SERIES, start=1):
        svg = svg.replace(colour, f"var(--series-{number})")
    return f'<figure tabindex="0"><figcaption>{escape(title)}</figcaption>{svg.strip()}</figure>'
