"""What ``verify`` does not check, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from quarkconv.description.description import Description
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import expert_activation
from quarkconv.experts.layer import MoELayer
from quarkconv.findings import NOT_UNDERSTOOD, PASSED_ON, Finding
from quarkconv.text import examples, plural
from quarkconv.verify.numbers import unsupported_activation
from quarkconv.verify.results import StructureResult, UncheckedLayer

_AT_RUN_TIME: Final = {"rotation-online": "rotated", "smoothing-online": "multiplied by stored factors"}
NO_MANIFEST: Final = "no quarkconv.json: quarkconv did not write this checkpoint"
NOT_REQUESTED: Final = "not requested"
STOPPED: Final = "stopped at the first problem (--fail-fast)"
_NOT_CHECKED: Final = PASSED_ON | {"mixed-precision", NOT_UNDERSTOOD}
"""Findings about files, tensors and linears that no stage checks, or whose numbers are not checked."""


def why_no_numbers(
    description: Description,
    layers: Sequence[MoELayer],
    unknown: Sequence[UncheckedLayer],
    structure: StructureResult,
    stages: Collection[str],
    *,
    with_source: bool,
    stopped: bool,
) -> str | None:
    """The reason why the numbers of these layers are not checked; None where they are.

    Args:
        description: the checkpoint.
        layers: the layers.
        unknown: of these, those of :func:`unknown_functions`.
        structure: the stage of structure.
        stages: the stages that were requested.
        with_source: whether the source is compared.
        stopped: whether a problem ended the verification.
    """
    if "numbers" not in stages:
        return NOT_REQUESTED
    if not structure.readable:
        return "the structure is broken"
    if not layers and (unread := description.renamed_experts):
        return f"{plural(len(unread), 'module')} of experts were not recognised: {examples(unread)}"
    if not layers:
        return "no experts are stored in int8" + (
            "" if with_source else "; --source compares their bytes with the dequantized codes of the source"
        )
    if len(unknown) == len(layers):
        return unknown[0].reason
    return STOPPED if stopped else None


def unknown_functions(description: Description, layers: Sequence[MoELayer]) -> list[UncheckedLayer]:
    """The layers whose experts have a function that is unknown, or that the INT8 forward does not compute."""
    codes = {item.code for item in description.findings}
    at_run_time = next((what for code, what in _AT_RUN_TIME.items() if code in codes), None)
    found = []
    for layer in layers:
        activation = expert_activation(description.config.raw, layer)
        if at_run_time is not None:
            reason: str | None = (
                f"activations are {at_run_time} at run time, which quarkconv's INT8 forward does not do"
            )
        elif isinstance(activation, Unknown):
            reason = f"the function of the experts is unknown: {activation.reason}"
        else:
            reason = unsupported_activation(activation)
        if reason is not None:
            found.append(UncheckedLayer(layer.prefix, reason))
    return found


def passed_on(description: Description, source: Description | None) -> Iterator[Finding]:
    """Files and tensors of the checkpoint, or its source, that are not checked."""
    found = [item for each in (description, source) if each is not None for item in each.findings]
    yield from dict.fromkeys(item for item in found if item.code in _NOT_CHECKED)
