"""The report of ``verify``: verdict, stages, problems, numbers by layer, experts, worst weights."""

from __future__ import annotations

from collections.abc import Iterator

from quarkconv.report import charts, page
from quarkconv.report.series import expert_load, scale_distribution, scale_ranges, signal_to_noise, weight_errors
from quarkconv.text import plural, size
from quarkconv.verify.layer_results import RESCALED, Distance, LayerExperts, LayerNumbers
from quarkconv.verify.results import NumbersResult, Verification

_WORST = 50


def verification_report(verification: Verification, command: str) -> str:
    """A verification as one self-contained HTML file; ``command`` is shown in it."""
    return page.page(f"quarkconv verify {verification.model}", verification.model, _parts(verification, command))


def _parts(verification: Verification, command: str) -> Iterator[str]:
    yield page.verdict(verification.verdict(), good=verification.ok)
    yield page.table_section("What was checked", ("stage", "what", "result"), _stages(verification))
    if verification.problems:
        rows = [(item.stage, item.layer, item.tensor, item.message, item.count) for item in verification.problems]
        yield page.table_section("Problems", ("stage", "layer", "tensor", "what is wrong", "places"), rows)
    if verification.findings:
        found = [(item.code, item.subject, item.message, item.hint) for item in verification.findings]
        yield page.table_section("Not part of it", ("code", "subject", "what", "next"), found)
    layers = verification.numbers.layers
    if layers:
        yield page.section("Numbers", *_numbers(verification.numbers))
    experts = verification.numbers.experts
    if experts:
        yield page.section("Experts", *_experts(experts))
    worst = verification.numbers.worst(_WORST)
    if worst:
        rows_of_weights = [
            (verification.numbers.label(layer, module), role, expert, error.relative_error, error.snr_db, error.clipped)
            for layer, module, role, expert, error in worst
        ]
        head = ("layer", "projection", "expert", "relative error", "SNR (dB)", "clipped share")
        yield page.table_section("Worst weights", head, rows_of_weights, sortable=True)
    yield page.about(command)


def _stages(verification: Verification) -> list[tuple[str, str, str]]:
    structure, checked, numbers = verification.structure, verification.bytes, verification.numbers
    wrong = {problem.stage for problem in verification.problems}
    against = "the manifest" + (" and the source" if checked.against_source else "")
    tokens = " and ".join(map(str, numbers.tokens))
    layers = len({layer.module for layer in numbers.layers})
    left_out = f"; not checked: {plural(len(numbers.not_checked), 'layer')}" if numbers.not_checked else ""
    what = {
        "structure": f"{plural(structure.tensors, 'tensor')} in {plural(structure.files, 'file')}",
        "bytes": checked.skipped or f"{plural(checked.pieces, 'piece')}, {size(checked.nbytes)}, against {against}",
        "numbers": numbers.skipped
        or f"{plural(layers, 'layer')}, {tokens} tokens each, on {numbers.device} ({numbers.backend}){left_out}",
    }
    skipped = {"bytes": checked.skipped, "numbers": numbers.skipped}
    return [
        (stage, scope, "✗ wrong" if stage in wrong else "not checked" if skipped.get(stage) else "✓ right")
        for stage, scope in what.items()
    ]


def _numbers(numbers: NumbersResult) -> Iterator[str]:
    layers = numbers.layers
    by_tokens = signal_to_noise(layers)
    for noise in by_tokens:
        suffix = f", {noise.tokens} tokens" if len(by_tokens) > 1 else ""
        lowest = [
            f"{name} at least {value:.1f} dB, in layer {layer}"
            for name, (value, layer) in ((name, noise.lowest(name)) for name in noise.lines)
        ]
        yield charts.line_chart(
            f"Signal to noise of each layer's output{suffix}",
            noise.layers,
            noise.lines,
            y_label="dB",
            described=f"Signal to noise ratio by layer: {'; '.join(lowest) or 'equal'}.",
        )
        yield _exact([layer for layer in layers if layer.tokens == noise.tokens], suffix)
    head = (
        "layer",
        "tokens",
        "vs exact",
        "vs dequantized",
        "with outliers",
        "vs unquantized",
        "SNR (dB)",
        "cosine",
        "seconds",
        "result",
    )
    rows = [
        (
            numbers.label(layer.layer, layer.module),
            layer.tokens,
            layer.exact.relative_error,
            layer.dequantized.relative_error,
            _error(layer.outliers),
            _error(layer.unquantized),
            layer.dequantized.snr_db,
            layer.dequantized.cosine,
            layer.seconds,
            "✓" if layer.ok else "✗",
        )
        for layer in layers
    ]
    yield page.table(head, rows, sortable=True, label="Layers: relative errors of the INT8 forward", captioned=True)
    for conditions in dict.fromkeys(
        f"Inputs: {item.inputs}. Routing: {item.routing}. Activation: {item.activation}." for item in layers
    ):
        yield page.paragraph(conditions)


def _exact(layers: list[LayerNumbers], suffix: str) -> str:
    """Distance from exact integer arithmetic: a chart, or a sentence where every layer is equal."""
    errors = [layer.exact.relative_error for layer in layers]
    if not any(errors):
        return page.paragraph(f"Equal to exact integer arithmetic in every layer{suffix}.")
    bound = min(layer.exact.bound for layer in layers)
    return charts.line_chart(
        f"Distance from exact integer arithmetic{suffix}",
        [layer.layer for layer in layers],
        {"relative error": errors},
        y_label="relative error",
        log=True,
        bound=bound,
        described=f"Relative error by layer, at most {max(errors):.2g}; the lowest bound is {bound:.2g}. "
        "Layers that are equal have no mark.",
    )


def _experts(layers: tuple[LayerExperts, ...]) -> Iterator[str]:
    errors, load = weight_errors(layers), expert_load(layers)
    if any(layer.rescaled for layer in layers):
        yield page.paragraph(f"{RESCALED}.")
    if errors is not None:
        yield charts.heat_map(errors)
    yield charts.heat_map(scale_ranges(layers))
    scales = scale_distribution(layers)
    yield charts.bar_chart(
        "Distribution of weight scales",
        [f"{edge:g}" for edge in scales.edges[:-1]],
        scales.counts,
        x_label="log10(scale)",
        y_label="rows",
        described=f"Scales lie between 10^{scales.edges[0]:g} and 10^{scales.edges[-1]:g}.",
    )
    if load is not None:
        yield charts.heat_map(load)


def _error(distance: Distance | None) -> float | None:
    return None if distance is None else distance.relative_error
