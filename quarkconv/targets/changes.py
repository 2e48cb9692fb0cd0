"""What a conversion changes or leaves out, as findings, so that nothing of the source is lost in silence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final

from quarkconv.description.description import Description
from quarkconv.findings import PASSED_ON, Finding, bounded, finding
from quarkconv.targets.base import Target
from quarkconv.text import plural

_DEQUANTIZED: Final = "BF16"


def conversion_findings(description: Description, target: Target) -> tuple[Finding, ...]:
    """Everything that a conversion leaves out, changes, or passes on without understanding it."""
    of_source = (item for item in description.findings if item.code in PASSED_ON)
    return tuple(bounded(chain(of_source, _changes(description, target))))


def target_findings(description: Description, target: Target) -> tuple[Finding, ...]:
    """The settings and tensors of the source that a target leaves out or changes."""
    return tuple(bounded(_changes(description, target)))


def _changes(description: Description, target: Target) -> Iterator[Finding]:
    yield from target.losses(description)
    names = target.dropped(description)
    if names:
        yield finding(
            "tensor-dropped",
            names[0],
            f"Scales and zero points of activations are left out: {len(names)}, first {names[0]}",
            count=len(names),
        )
    modules = description.float_modules
    if modules and description.declared is not None and target.quantizes:
        yield finding(
            "module-dequantized",
            modules[0],
            f"{plural(len(modules), 'module')} that engines keep in float, dequantized to {_DEQUANTIZED} with one "
            f"rounding: {', '.join(modules[:3])}" + (", ..." if len(modules) > 3 else ""),
            count=len(modules),
        )
    dropped = description.mtp_dropped
    if dropped is not None:
        held = f"{plural(len(dropped), 'tensor')}, first {dropped[0]}" if dropped else "none was stored"
        yield finding(
            "mtp-dropped",
            dropped[0] if dropped else "config.json",
            f"The layers of multi-token prediction are left out: {held}",
            count=len(dropped),
        )
