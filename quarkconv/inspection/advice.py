"""What to do with a checkpoint for each engine, from the rows that apply to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from quarkconv.inspection.engine_facts import ENGINE_NAMES, NOT_CHECKED, EngineFact
from quarkconv.inspection.engines import (
    ARCHITECTURES_NOTE,
    CLASS_NOTE,
    ENCODERS_NOTE,
    FP8_NOTE,
    FUNCTION_NOTE,
    NAMES_NOTE,
    OUTPUTS_NOTE,
    STACKS_NOTE,
    TENSORS_NOTE,
)

_SILENT_FAULTS: Final = {
    "w8a16": ("keeps activations in 16 bits", "keep activations in 16 bits"),
    "wrong": ("computes wrong results", "compute wrong results"),
}
"""Verdict -> what one release, or several, do without an error."""
_FAULTS: Final = {"wrong": _SILENT_FAULTS["wrong"][0], "fails": "fails"}
"""Verdict -> what a release does that was run with the model type."""
_NOT_CHECKED_WITH: Final = {
    FP8_NOTE: "linears in FP8 beside INT8 experts",
    ENCODERS_NOTE: "int8 linears of encoders",
    CLASS_NOTE: "this model class",
    ARCHITECTURES_NOTE: "a config.json without architectures",
    STACKS_NOTE: "layers that config.json does not describe",
    NAMES_NOTE: "these names of experts",
    TENSORS_NOTE: "tensors of unknown meaning",
    OUTPUTS_NOTE: "these scales of outputs",
    FUNCTION_NOTE: "these settings of the layers",
}
"""End of a row's note -> what its engine was not checked with."""

_OPTIONS: Final = ("with --", "with QUARKCONV_VLLM=1")
"""How a row's note begins where its engine needs options, or quarkconv's plugin."""


class Advice(NamedTuple):
    """What to do with a checkpoint for one engine.

    Attributes:
        text: one line.
        target: what to convert the checkpoint to; None when it stays as it is.
    """

    text: str
    target: str | None = None


def advice(stored: str | None, facts: Iterable[EngineFact]) -> tuple[Advice, ...]:
    """Advice for each engine that runs the checkpoint on NVIDIA GPUs, or runs it wrongly without an error.

    Args:
        stored: the form of the checkpoint, see :func:`quarkconv.inspection.engines.stored_form`.
        facts: the rows that apply, best first, see :func:`quarkconv.inspection.engines.engines_for`.
    """
    by_engine: dict[str, list[EngineFact]] = {}
    for fact in facts:
        if not fact.devices:
            by_engine.setdefault(fact.engine, []).append(fact)
    found = (_advice(ENGINE_NAMES.get(engine, engine), rows, stored) for engine, rows in by_engine.items())
    return tuple(item for item in found if item is not None)


def _advice(name: str, facts: list[EngineFact], stored: str | None) -> Advice | None:
    """Advice for one engine: use it, convert, or beware."""
    best = facts[0]
    faults = []
    for verdict, (one, several) in _SILENT_FAULTS.items():
        versions = [fact.version for fact in facts if (fact.form, fact.verdict) == (stored, verdict)]
        if versions:
            faults.append(f"{' and '.join(versions)} {one if len(versions) == 1 else several}")
    beware = ", ".join(faults)
    if best.verdict == NOT_CHECKED:
        why = next((text for note, text in _NOT_CHECKED_WITH.items() if best.note.endswith(note)), "this model type")
        if known := _known_faults(facts, stored):
            return Advice(f"{name} {known}; other releases were not checked with {why}")
        return Advice(f"{name} was not checked with {why}" + (f"; as it is, {beware}" if faults else ""))
    if best.verdict != "int8":
        known = beware or _known_faults(facts, stored)
        return Advice(f"{name} {known}") if known else None
    runs = f"{name} {best.version} runs it in int8"
    first = best.note.partition(";")[0].partition(":")[0]
    options = f", {first}" if first.startswith(_OPTIONS) else ""
    if best.form == stored:
        return Advice(f"{runs} as it is{options}" + (f"; {beware}" if faults else ""))
    text = f"{runs} after convert --to {best.form}{options}" + (f"; as it is, {beware}" if faults else "")
    return Advice(text, best.form)


def _known_faults(facts: list[EngineFact], stored: str | None) -> str:
    """What releases do with a checkpoint of this model type as it is and converted; empty where no row says so."""
    forms: dict[tuple[str, str], list[str]] = {}
    for fact in facts:
        if fact.model_types and fact.verdict in _FAULTS:
            form = "as it is" if fact.form == stored else f"after convert --to {fact.form}"
            forms.setdefault((fact.version, fact.verdict), []).append(form)
    return ", ".join(
        f"{version} {_FAULTS[verdict]} {' and '.join(found)}" for (version, verdict), found in forms.items()
    )
