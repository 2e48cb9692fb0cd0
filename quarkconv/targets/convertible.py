"""Whether a checkpoint can be converted to a target, and if not, the first reason why."""

from __future__ import annotations

from typing import Final

from quarkconv.description.description import Description
from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.experts.ranks import WHOLE, Rank
from quarkconv.findings import NOT_UNDERSTOOD, refusal
from quarkconv.targets.base import Target

_TARGETS: Final = "run `quarkconv inspect` for the targets that can"


def check_convertible(description: Description, target: Target, rank: Rank = WHOLE) -> None:
    """Raise the first reason why a checkpoint cannot be converted to ``target``.

    Args:
        description: the source.
        target: what to convert it to.
        rank: the rank whose part of the experts is written.

    Raises:
        UsageError: the target is not written by rank.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, the target cannot represent it, or its experts cannot be divided.
    """
    root = str(description.checkpoint.root)
    findings = description.findings
    if not target.stacks and description.renamed_experts:
        findings = tuple(item for item in findings if item.code != NOT_UNDERSTOOD)
    blocked = refusal(findings, root, "source", "converted")
    if blocked is not None:
        raise blocked
    if not description.config.rank.is_whole:
        raise UnsupportedError(
            "The source is the part of one rank, not a whole model",
            file=root,
            expected="a whole checkpoint",
            found=description.config.rank.folder(),
            hint="convert the whole checkpoint",
        )
    reason = target.unsupported(description)
    if reason is not None:
        hint = next((item.hint for item in description.errors() if item.hint), _TARGETS)
        if not target.quantizes and "--quantize" in hint:
            hint = f"convert to another target with --quantize missing, then convert that to {target.name}"
        raise UnsupportedError(
            f"The target {target.name} cannot represent this checkpoint: {reason}", file=root, hint=hint
        )
    if not rank.is_whole and not target.by_rank:
        raise UsageError(
            "This target has no ranks: engines divide it themselves", expected="fused-int8", found=target.name
        )
    for layer in description.int8_layers:
        rank.check(layer.prefix, layer.experts, layer.intermediate)
