"""What ``verify`` found, as a page with charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from quarkconv.report import charts, page
from quarkconv.verify.results import SCALE_EDGES, Distance, LayerExperts, LayerNumbers, Verification

_WORST = 50


def verification_report(verification: Verification, command: str) -> str:
    """A verification as one HTML file that needs nothing else.

    Args:
        verification: what was found.
        command: the command that found it.
    """
    return page.page(f"quarkconv verify {verification.model}", verification.model, _parts(verification, command))


def _parts(verification: Verification, command: str) -> Iterator[str]:
    said = "Verified" if verification.ok else f"Not verified: {len(verification.problems):,} problem(s)"
    skipped = [stage for stage, why in _skipped(verification) if why]
    yield page.verdict(said + (f"; not checked: {', '.join(skipped)}" if skipped else ""), good=verification.ok)
    yield page.section("What was checked", page.table(("stage", "what", "result"), _stages(verification)))
    if verification.problems:
        rows = [(item.stage, item.layer, item.tensor, item.message, item.count) for item in verification.problems]
        yield page.section("Problems", page.table(("stage", "layer", "tensor", "what is wrong", "places"), rows))
    layers = verification.numbers.layers
    if layers:
        yield page.section("Numbers", *_numbers(layers))
    experts = verification.numbers.experts
    if experts:
        yield page.section("Experts", *_experts(experts))
    worst = verification.numbers.worst(_WORST)
    if worst:
        rows_of_weights = [
            (layer, role, expert, error.relative_error, error.snr_db, error.clipped)
            for layer, role, expert, error in worst
        ]
        head = ("layer", "projection", "expert", "relative error", "SNR (dB)", "clipped share")
        yield page.section("Worst weights", page.table(head, rows_of_weights, sortable=True))
    yield page.about(command)


def _skipped(verification: Verification) -> list[tuple[str, str | None]]:
    return [("bytes", verification.bytes.skipped), ("numbers", verification.numbers.skipped)]


def _stages(verification: Verification) -> list[tuple[str, str, str]]:
    structure, checked, numbers = verification.structure, verification.bytes, verification.numbers
    wrong = {problem.stage for problem in verification.problems}
    against = "the manifest" + (" and the source" if checked.against_source else "")
    tokens = " and ".join(map(str, numbers.tokens))
    layers = len({layer.layer for layer in numbers.layers})
    what = {
        "structure": f"{structure.tensors:,} tensors in {structure.files:,} files",
        "bytes": checked.skipped or f"{checked.pieces:,} pieces, {checked.nbytes:,} bytes, against {against}",
        "numbers": numbers.skipped or f"{layers} layers, {tokens} tokens each, on {numbers.device} ({numbers.backend})",
    }
    missing = {stage for stage, why in _skipped(verification) if why}
    return [
        (stage, said, "✗ wrong" if stage in wrong else "not checked" if stage in missing else "✓ right")
        for stage, said in what.items()
    ]


def _numbers(layers: tuple[LayerNumbers, ...]) -> Iterator[str]:
    counts = list(dict.fromkeys(layer.tokens for layer in layers))
    for tokens in counts:
        chosen = [layer for layer in layers if layer.tokens == tokens]
        x = [layer.layer for layer in chosen]
        suffix = f", {tokens} tokens" if len(counts) > 1 else ""
        noise = {
            "dequantized": [layer.reference.snr_db for layer in chosen],
            "with outliers": [_snr(layer.outliers) for layer in chosen],
            "unquantized": [_snr(layer.original) for layer in chosen],
        }
        noise = {name: values for name, values in noise.items() if any(value is not None for value in values)}
        lowest = min(chosen, key=lambda layer: layer.reference.snr_db or math.inf)
        yield charts.line_chart(
            f"Signal to noise of each layer's output{suffix}", x, noise, x_label="layer", y_label="dB",
            described=f"Signal to noise ratio by layer; the lowest against the dequantized model is "
            f"{lowest.reference.snr_db or math.inf:.1f} dB in layer {lowest.layer}.",
        )  # fmt: skip
        exact = [layer.exact.relative_error for layer in chosen]
        yield charts.line_chart(
            f"Distance from exact integer arithmetic{suffix}", x, {"relative error": exact}, x_label="layer",
            y_label="relative error", log=True, bound=chosen[0].exact.bound,
            described=f"Relative error by layer, at most {max(exact):.2g}; the bound is {chosen[0].exact.bound:.2g}. "
            "Layers that are equal have no mark.",
        )  # fmt: skip
    head = ("layer", "tokens", "vs exact", "vs dequantized", "with outliers", "vs unquantized", "SNR (dB)", "cosine",
            "seconds", "result")  # fmt: skip
    rows = [
        (layer.layer, layer.tokens, layer.exact.relative_error, layer.reference.relative_error,
         _error(layer.outliers), _error(layer.original), layer.reference.snr_db, layer.reference.cosine,
         layer.seconds, "✓" if layer.ok else "✗")
        for layer in layers
    ]  # fmt: skip
    yield page.table(head, rows, sortable=True, caption="Layers: relative errors of the INT8 forward")
    for said in dict.fromkeys(f"Inputs: {item.inputs}. Routing: {item.routing}. Activation: {item.activation}."
                              for item in layers):  # fmt: skip
        yield page.paragraph(said)


def _experts(layers: tuple[LayerExperts, ...]) -> Iterator[str]:
    rows = [layer.layer for layer in layers]
    if any(layer.weights for layer in layers):
        errors = [_worst_errors(layer) for layer in layers]
        yield charts.heat_map(
            "Weight error of each expert", rows, errors, label="relative error",
            described=f"Relative error of the weights, the worst of the three projections, by layer and expert; "
            f"the largest is {max(max(row, default=0.0) for row in errors):.3g}.",
        )  # fmt: skip
    spans = [
        [math.log10(high / low) if low > 0 and math.isfinite(high) else None
         for low, high in zip(layer.scale_min, layer.scale_max, strict=True)]
        for layer in layers
    ]  # fmt: skip
    yield charts.heat_map(
        "Range of weight scales of each expert", rows, spans, label="log10(largest / smallest)",
        described="Decades between the smallest and the largest weight scale, by layer and expert.",
    )  # fmt: skip
    totals = [sum(layer.scale_histogram[at] for layer in layers) for at in range(len(SCALE_EDGES) - 1)]
    filled = [at for at, total in enumerate(totals) if total] or [0]
    shown = range(filled[0], filled[-1] + 1)
    yield charts.bar_chart(
        "Distribution of weight scales", [f"{SCALE_EDGES[at]:g}" for at in shown],
        [totals[at] for at in shown], x_label="log10(scale)", y_label="rows",
        described=f"Scales lie between 10^{SCALE_EDGES[filled[0]]:g} and 10^{SCALE_EDGES[filled[-1] + 1]:g}.",
    )  # fmt: skip
    load = [list(map(float, layer.load)) for layer in layers]
    if any(map(any, load)):
        yield charts.heat_map(
            "Tokens that the routing sent to each expert", rows, load, label="tokens",
            described=f"Load by layer and expert, at most {max(map(max, load)):.0f} tokens.",
        )  # fmt: skip


def _worst_errors(layer: LayerExperts) -> list[float]:
    """The worst of an expert's projections."""
    columns: list[Sequence[float]] = [[error.relative_error for error in errors] for errors in layer.weights.values()]
    return [max(values) for values in zip(*columns, strict=True)]


def _snr(distance: Distance | None) -> float | None:
    return None if distance is None else distance.snr_db


def _error(distance: Distance | None) -> float | None:
    return None if distance is None else distance.relative_error
