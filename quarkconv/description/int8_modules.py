"""The defects of int8 modules: scales and zero points that are missing, or have the wrong dtype or shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from math import prod
from typing import Final

from quarkconv.experts.layer_defects import MAX_EXPERTS
from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.form import NARROW_DTYPES, SCALE_DTYPES, Form
from quarkconv.scheme.resolved import ResolvedModules
from quarkconv.scheme.spec import INPUT_STATIC, PER_CHANNEL, ModuleScheme
from quarkconv.text import plural

CONVERT: Final = "convert it: quarkconv writes a config that matches the tensors"
REQUANTIZE: Final = "quantize it again: engines fail on it or compute wrong results"


_Check = tuple[str, Callable[[Form, ModuleScheme], object], str, str]

_CHECKS: Final[tuple[_Check, ...]] = (
    ("scale-missing", lambda form, _: form.scale is None, "{} in int8 without weight_scale", REQUANTIZE),
    (
        "scale-missing",
        lambda form, claim: form.input_scale is None and _is_static(claim),
        "{} declared with a static input scale that is not stored",
        REQUANTIZE,
    ),
    (
        "weight-shape",
        lambda form, _: 0 in form.weight.shape or prod(form.weight.shape[:-2]) > MAX_EXPERTS,
        f"{{}} in int8 with no elements, or with more than {MAX_EXPERTS} matrices",
        "the file is corrupt: export the model again",
    ),
    (
        "scale-dtype",
        lambda form, _: any(
            kind is not None and kind.dtype not in SCALE_DTYPES for kind in (form.scale, form.input_scale)
        ),
        "{} with a scale that is not F32, BF16 or F16",
        REQUANTIZE,
    ),
    (
        "scheme-unsupported",
        lambda form, _: _is_of_parts(form),
        "{} with scales per group, block or column",
        "quarkconv converts weights with a scale for each row, [out] or [out, 1], or one for the tensor",
    ),
    (
        "scale-shape",
        lambda form, _: form.scale is not None and form.granularity is None and not _is_of_parts(form),
        "{} with a scale that is neither per channel nor per tensor",
        REQUANTIZE,
    ),
    (
        "dtype-mismatch",
        lambda _, claim: claim.weight is not None and claim.weight.dtype != "int8",
        "{} in int8 that {file} declares in another dtype",
        CONVERT,
    ),
    (
        "scheme-unsupported",
        lambda form, _: form.input_scale is not None and _is_of_channels(form.input_scale.shape, form.weight.shape),
        "{} with a static input scale per channel",
        "quarkconv converts dynamic activations, and static ones with one scale",
    ),
    (
        "scale-shape",
        lambda form, _: (
            form.input_scale is not None
            and not _is_input_scale(form.input_scale.shape, form.weight.shape)
            and not _is_of_channels(form.input_scale.shape, form.weight.shape)
        ),
        "{} with a static input scale that is neither one value nor one per matrix",
        REQUANTIZE,
    ),
    (
        "scheme-unsupported",
        lambda form, claim: _is_of_columns(form, claim),
        "{} with as many scales as rows and columns; {file} declares them per column",
        "quarkconv converts weights with a scale for each row, [out] or [out, 1], or one for the tensor",
    ),
    (
        "granularity-mismatch",
        lambda form, claim: (
            form.granularity is not None
            and claim.weight is not None
            and form.granularity != claim.weight.granularity
            and not _is_of_columns(form, claim)
        ),
        "{} whose scales have a different granularity than {file} declares",
        CONVERT,
    ),
    (
        "granularity-mismatch",
        lambda form, claim: form.input_scale is not None and claim.weight is not None and not _is_static(claim),
        "{} with a static input scale that {file} does not declare",
        CONVERT,
    ),
    (
        "zero-point-shape",
        lambda form, _: any(
            point is not None and form.scale is not None and prod(point.shape) != prod(form.scale.shape)
            for point in (form.zero_point, form.offset)
        ),
        "{} whose zero point and scale differ in shape",
        REQUANTIZE,
    ),
    (
        "scale-narrow",
        lambda form, _: form.scale is not None and form.scale.dtype in NARROW_DTYPES,
        "{} with a 16-bit scale; conversion widens it to F32 exactly",
        "",
    ),
    (
        "zero-point-present",
        lambda form, _: any(form.zero_points),
        "{} with stored zero points; conversion checks that they are zero and drops them",
        "",
    ),
)
"""(code, test, message, hint), applied to every int8 module; ``{}`` becomes "3 modules"."""


def int8_defects(modules: ResolvedModules, other_scales: Collection[str], file: str) -> Iterator[Finding]:
    """The findings about the tensors of int8 modules.

    Args:
        modules: all modules, with the scheme of each.
        other_scales: modules without ``weight_scale`` and with scales of another kind or name, reported elsewhere.
        file: the file that declares the scheme.
    """
    for code, test, message, hint in _CHECKS:
        found = [
            name
            for (form, claim), names in modules.groups.items()
            if form.quantized and not claim.is_foreign and test(form, claim)
            for name in names
            if form.scale is not None or name not in other_scales
        ]
        text = message.format(plural(len(found), "module"), file=file)
        yield from FindingsAbout(code, found, text, hint=hint)


def shapes_explained(findings: Iterable[Finding], declared: DeclaredScheme | None) -> Iterator[Finding]:
    """The findings about experts; shapes that do not fit are unsupported where another dtype than int8 is declared.

    Codes of fewer bits are packed along rows or columns, so their weights have other shapes: W4A8 of Ascend has half
    the rows (``w4a8.py`` of vllm-ascend).
    """
    for item in findings:
        claim = declared.resolve(item.subject).weight if declared and item.code == "expert-shape" else None
        if claim is None or claim.dtype == "int8" or declared is None:
            yield item
            continue
        yield finding(
            "scheme-unsupported",
            item.subject,
            f"{declared.file} declares the experts {claim.dtype}, but their shapes are not those of int8 weights",
            hint="quarkconv converts symmetric INT8 W8A8 only",
        )


def _is_of_parts(form: Form) -> bool:
    """Whether the scales have a shape of other schemes: of groups [out, in / g], blocks, columns, or rows [1, out]."""
    if form.scale is None or form.granularity is not None or len(form.weight.shape) < 2:
        return False
    (*lead, out, columns), shape = form.weight.shape, form.scale.shape
    if shape in ((columns,), (*lead, 1, out), (*lead, 1, columns), (*lead, columns), (*lead, columns, 1)):
        return True
    (*scale_lead, rows, groups) = (0, 0, *shape)[-len(form.weight.shape) :]
    return scale_lead == lead and 0 < rows <= out and 0 < groups <= columns and not (out % rows or columns % groups)


def _is_of_columns(form: Form, claim: ModuleScheme) -> bool:
    """Whether the scales [n] of a weight [n, n] are declared along another axis than its rows."""
    if form.scale is None or form.granularity != PER_CHANNEL or claim.weight is None:
        return False
    *lead, rows, columns = form.weight.shape
    other_axis = claim.weight.granularity.startswith(f"{PER_CHANNEL}(")
    return other_axis and rows == columns and form.scale.shape == (*lead, rows)


def _is_input_scale(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return prod(shape) in (1, prod(weight[:-2]))


def _is_of_channels(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a static input scale has a value for each input of the weight, and these are not its matrices."""
    several = len(weight) > 1 and not _is_input_scale(shape, weight)
    return several and prod(shape) in (weight[-1], prod(weight[:-2]) * weight[-1])


def _is_static(scheme: ModuleScheme) -> bool:
    activation = scheme.activation
    return activation is not None and activation._replace(symmetric=True) == INPUT_STATIC
