"""The findings for experts that do not make a layer: missing, packed, of two sizes, or of shapes that do not fit."""

from __future__ import annotations

from typing import Final

from quarkconv.experts.naming import Role
from quarkconv.experts.unread import RENAMED_HINT
from quarkconv.findings import NOT_UNDERSTOOD, Finding, finding
from quarkconv.scheme.form import Form
from quarkconv.text import plural

MAX_EXPERTS: Final = 2**16
"""Experts of a layer, at most: tensors without bytes can claim any number."""


def missing_experts(
    prefix: str, numbers: set[int], projections: dict[str, dict[int, Form]], leaves: dict[Role, str]
) -> Finding | None:
    """The finding for a layer that lacks experts, or projections of some."""
    experts = set(range(len(numbers)))
    if experts == numbers and all(projections.get(name, {}).keys() == numbers for name in leaves.values()):
        return None
    gaps = [number for number in range(len(numbers)) if number not in numbers]
    lost = [
        f"{number}.{name}"
        for name in leaves.values()
        for number in sorted(numbers)
        if number not in projections.get(name, {})
    ]
    count = max(numbers) + 1 - len(numbers) if gaps else len(lost)
    noun = "expert" if gaps else "projection"
    first = f"expert {gaps[0]}" if gaps else lost[0]
    return finding(
        "expert-missing",
        prefix,
        f"The layer numbers its experts up to {max(numbers)} but lacks {plural(count, noun)}, beginning with {first}",
        hint="download the checkpoint again; if it was published like this, quantize it again",
        count=count,
    )


def packed_experts(prefix: str, forms: dict[Role, tuple[Form, ...]], *, joined: bool) -> Finding | None:
    """The finding for a layer of which each weight has half the columns that the rows of the others ask for."""
    for up, down in zip(forms["gate" if joined else "up"], forms["down"], strict=True):
        if min(len(up.weight.shape), len(down.weight.shape)) < 2:
            return None
        (*_, rows, columns), (*_, out, inner) = up.weight.shape, down.weight.shape
        if (2 * columns, 2 * inner) != (out, rows // 2 if joined else rows):
            return None
    return finding(
        "scheme-unsupported",
        prefix,
        "The experts are stored with two codes per element, as int4",
        hint="quarkconv converts symmetric INT8 W8A8 only",
    )


def experts_of_two_sizes(prefix: str, forms: dict[Role, tuple[Form, ...]], *, joined: bool) -> Finding | None:
    """The finding for a layer whose experts each fit together and differ in size, as those of text and of images do."""
    sizes: list[int] = []
    for up, down in zip(forms["gate" if joined else "up"], forms["down"], strict=True):
        if len(up.weight.shape) != 2 or len(down.weight.shape) != 2:
            return None
        (rows, hidden), (out, inner) = up.weight.shape, down.weight.shape
        if (rows // 2 if joined else rows, hidden) != (inner, out):
            return None
        sizes.append(inner)
    if len(set(sizes)) < 2:
        return None
    return finding(
        NOT_UNDERSTOOD,
        prefix,
        f"The experts of one module differ in size: intermediate sizes {', '.join(map(str, dict.fromkeys(sizes)))}",
        hint=RENAMED_HINT,
        count=len(sizes),
    )


def implausible_geometry(prefix: str, geometry: tuple[int, int, int]) -> Finding | None:
    """The finding for a layer without experts, with empty ones, or with more than any model has."""
    experts, hidden, intermediate = geometry
    if 0 < experts <= MAX_EXPERTS and hidden and intermediate:
        return None
    return finding(
        "expert-shape",
        prefix,
        f"The layer has {experts} experts, hidden {hidden}, intermediate {intermediate}; expected 1 to "
        f"{MAX_EXPERTS} experts, and sizes above 0",
        hint="the file is corrupt: export the model again",
    )


def wrong_shape(subject: str, expected: tuple[int, ...], found: tuple[int, ...]) -> Finding:
    """The finding for a projection, or its bias, whose shape is not that of the others."""
    return finding(
        "expert-shape",
        subject,
        f"The projection has shape {list(found)}; the others of its layer need {list(expected)}",
        hint="download the checkpoint again; if it was published like this, quantize it again",
    )
