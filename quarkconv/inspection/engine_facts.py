"""The table of engines, ``engines.toml`` beside this file: which of them run a checkpoint, with the evidence.

``make docs`` copies it to ``engines.json``, which is read here: that takes a thirtieth of the time of parsing TOML.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from quarkconv.text import alternatives

NOT_CHECKED: Final = "not checked"
"""The verdict of a row that was never tried with the model type."""
VERDICTS: Final = ("int8", "w8a16", NOT_CHECKED, "wrong", "fails")
"""Best first."""

ENGINE_NAMES: Final = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "quark": "Quark",
    "vllm-ascend": "vLLM Ascend",
    "ktransformers": "KTransformers",
}
"""Engine -> its name for people, where that differs."""

FEATURES: Final = {
    "float-experts": "experts of some layers in float",
    "float-shared-experts": "shared experts in float",
    "layer-types": "layer_type_quant_config",
    "exclude-patterns": "patterns with * in exclude",
    "block-sparse-names": "names with block_sparse_moe",
    "zero-points": "zero points",
    "unread-settings": "settings of Quark that vLLM reads otherwise",
    "foreign-projections": "projections of experts that engines name otherwise",
}
"""Conditions of a row beside scheme, layout and model type."""

RUNS: Final = ("int8", "w8a16")
"""Verdicts that hold only for model types that were tried."""
_TRIED: Final = ("served", "loader")
"""Kinds of evidence for which something ran."""
_CONDITIONS: Final = ("schemes", "layouts", "model_types", "not_model_types", "having", "not_having")
_PARTS: Final = {
    "model": "int8 linears that it alone keeps in float",
    "mtp": "int8 linears of MTP layers that it alone keeps in float",
}
"""Part of a model -> the condition ``int8_in_float``, for people."""
_FIELDS: Final = ("engine", "version", "as", "verdict", "note", "evidence")


class EngineFact(NamedTuple):
    """A row of the table. Conditions are empty where the row holds for every checkpoint.

    Attributes:
        verdict: one of :data:`VERDICTS`; ``not checked`` where none of its devices ran it.
        form: the form of the checkpoint: a target's name, or ``quark``.
        devices: where it was checked or read to run; empty for NVIDIA GPUs.
        checked: date of the evidence; empty where it was not recorded.
        int8_in_float: ``model`` or ``mtp``: the row is about checkpoints with int8 linears that this engine alone keeps
            in float, outside of layers of multi-token prediction or in them. It replaces rows without this condition.
    """

    engine: str
    version: str
    form: str
    verdict: str
    note: str
    evidence: str
    checked: str = ""
    devices: str = ""
    schemes: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    not_model_types: tuple[str, ...] = ()
    having: tuple[str, ...] = ()
    not_having: tuple[str, ...] = ()
    int8_in_float: str = ""

    def holds_for(
        self, scheme: str, layout: str | None, model_type: str | None, features: Collection[str] = ()
    ) -> bool:
        """Whether the row is about a checkpoint of this scheme, layout, model type and these :data:`FEATURES`."""
        conditions = ((self.schemes, scheme), (self.layouts, layout), (self.model_types, model_type))
        return (
            all(not allowed or value in allowed for allowed, value in conditions)
            and model_type not in self.not_model_types
            and set(self.having) <= set(features)
            and not set(self.not_having) & set(features)
        )

    def not_checked(self, note: str) -> EngineFact:
        """The row for what it was not checked with: a verdict of :data:`RUNS` becomes a part of the note."""
        if self.verdict not in RUNS:
            return self
        return self._replace(verdict=NOT_CHECKED, note=f"{self.verdict} {note}")

    @property
    def only_for(self) -> str:
        """The conditions, for people: ``ptpc_int8, mixed; not dbrx or step3``; empty for every checkpoint."""
        required = [*self.schemes, *self.layouts, *self.model_types, *(FEATURES[name] for name in self.having)]
        if self.int8_in_float:
            required.append(_PARTS[self.int8_in_float])
        excluded = [*self.not_model_types, *(FEATURES[name] for name in self.not_having)]
        return "; ".join(filter(None, (", ".join(required), f"not {alternatives(excluded)}" if excluded else "")))

    @property
    def tried(self) -> bool:
        """Whether something ran, by the evidence: else it was read."""
        return any(kind in self.evidence for kind in _TRIED)

    @property
    def proof(self) -> str:
        """Evidence and date, for people."""
        return f"{self.evidence}, {self.checked}" if self.checked else self.evidence

    @property
    def remark(self) -> str:
        """Devices and note, for people."""
        devices = f"on {self.devices}" if self.devices else ""
        reading = (
            "read in its source, not run" if self.devices and self.verdict != NOT_CHECKED and not self.tried else ""
        )
        return "; ".join(filter(None, (devices, self.note, reading)))

    def to_json(self) -> dict[str, str]:
        """The fields of the contract."""
        return {
            "engine": self.engine,
            "version": self.version,
            "as": self.form,
            "verdict": self.verdict,
            "note": self.remark,
        }


@cache
def engine_facts() -> tuple[EngineFact, ...]:
    """All rows of the table."""
    return tuple(_fact(row) for row in _table()["rows"])


@cache
def checked_classes() -> dict[str, dict[str, frozenset[str]]]:
    """Engine -> model type -> its classes in ``architectures`` that the engine was run with.

    Engines that read no model type are absent.
    """
    engines = _table()["checked_model_types"].items()
    return {engine: {name: frozenset(classes) for name, classes in types.items()} for engine, types in engines}


@cache
def checked_model_types() -> dict[str, frozenset[str]]:
    """Engine -> model types that it was run with, as rows name them: without an ending ``_text``."""
    return {
        engine: frozenset(name.removesuffix("_text") for name in types) for engine, types in checked_classes().items()
    }


@cache
def checked_in_one_release() -> dict[str, tuple[str, frozenset[str]]]:
    """Engine -> a release, and the model types that no other release was run with."""
    rows = _table()["checked_in_one_release"]
    return {engine: (row["release"], frozenset(row["model_types"])) for engine, row in rows.items()}


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("engines.json").read_text("utf-8"))
    return table


def _fact(row: dict[str, Any]) -> EngineFact:
    unknown = set(row) - {*_FIELDS, *_CONDITIONS, "int8_in_float", "checked", "devices"}
    part = str(row.get("int8_in_float", ""))
    if unknown or part not in ("", *_PARTS) or row["verdict"] not in VERDICTS or row["verdict"] == NOT_CHECKED:
        raise ValueError(f"engines.toml: a row for {row['engine']} is malformed")
    conditions = {key: tuple(row[key]) for key in _CONDITIONS if key in row}
    engine, version, form, verdict, note, evidence = (str(row[key]) for key in _FIELDS)
    checked, devices = str(row.get("checked", "")), str(row.get("devices", ""))
    fact = EngineFact(
        engine, version, form, verdict, note, evidence, checked, devices, int8_in_float=part, **conditions
    )
    if devices and verdict in RUNS and not fact.tried:
        return fact._replace(verdict=NOT_CHECKED, note="; ".join(filter(None, (f"{verdict} as read, not run", note))))
    return fact
