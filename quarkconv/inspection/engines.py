"""Which engine runs a checkpoint, from a table of facts with their evidence (``engines.toml`` beside this file)."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from quarkconv.description.description import Description
from quarkconv.scheme.patterns import is_pattern

VERDICTS: Final = ("int8", "w8a16", "wrong", "fails")
"""Best first."""

FUSED: Final = "fused-int8"
ENGINE_NAMES: Final = {"vllm": "vLLM", "sglang": "SGLang"}
"""How engines write their names, where that is not in small letters."""

FEATURES: Final = {
    "float-experts": "experts of some layers in float",
    "layer-types": "layer_type_quant_config",
    "exclude-patterns": "patterns with * in exclude",
    "zero-points": "zero points",
}
"""What a row may ask for beside scheme, layout and model type."""

_SILENTLY: Final = {"w8a16": "keeps activations in 16 bits", "wrong": "computes something else than the model"}
_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")
_CONDITIONS: Final = ("schemes", "layouts", "model_types", "not_model_types", "having", "not_having")
_FIELDS: Final = ("engine", "version", "as", "verdict", "note", "evidence")


@dataclass(frozen=True, slots=True)
class EngineFact:
    """A row of the table. The conditions are empty where the row holds for every checkpoint.

    ``checked`` is the day on which the fact was last looked at, empty where that is not recorded.
    """

    engine: str
    version: str
    form: str
    verdict: str
    note: str
    evidence: str
    checked: str = ""
    schemes: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    not_model_types: tuple[str, ...] = ()
    having: tuple[str, ...] = ()
    not_having: tuple[str, ...] = ()

    def holds_for(
        self, scheme: str, layout: str | None, model_type: str | None, features: Collection[str] = ()
    ) -> bool:
        """Whether the row is about a checkpoint of this scheme, layout, model type and these :data:`FEATURES`."""
        wanted = ((self.schemes, scheme), (self.layouts, layout), (self.model_types, model_type))
        return (
            all(not allowed or value in allowed for allowed, value in wanted)
            and model_type not in self.not_model_types
            and set(self.having) <= set(features)
            and not set(self.not_having) & set(features)
        )

    @property
    def only_for(self) -> list[str]:
        """What the row holds for, where that is not every checkpoint; for people."""
        excluded = [*self.not_model_types, *(FEATURES[name] for name in self.not_having)]
        held = [*self.schemes, *self.layouts, *self.model_types, *(FEATURES[name] for name in self.having)]
        return held + [f"not {name}" for name in excluded]

    @property
    def proof(self) -> str:
        """Evidence and date, for people."""
        return f"{self.evidence}, {self.checked}" if self.checked else self.evidence

    def to_json(self) -> dict[str, str]:
        """The fields of the contract."""
        return {
            "engine": self.engine,
            "version": self.version,
            "as": self.form,
            "verdict": self.verdict,
            "note": self.note,
        }


@cache
def engine_facts() -> tuple[EngineFact, ...]:
    """All rows of the table."""
    rows = tomllib.loads(Path(__file__).with_name("engines.toml").read_text("utf-8"))["rows"]
    return tuple(_fact(row) for row in rows)


def engines_for(description: Description, converted_to: Collection[str]) -> list[EngineFact]:
    """The rows that apply to a checkpoint as it is and after each conversion.

    Best first; of those that are as good, as it is before converted, and the latest release first.

    Args:
        description: the checkpoint.
        converted_to: the targets that it can be converted to.
    """
    scheme = description.scheme
    if scheme is None or not description.int8_layers or not description.config.rank.is_whole:
        return []
    layer, stored = description.int8_layers[0], stored_form(description)
    model_type = (description.config.model_type or "").removesuffix("_text")
    layouts: dict[str | None, str] = dict.fromkeys(converted_to, description.unfused_layout(layer))
    layouts |= {FUSED: "fused"} if FUSED in layouts else {}
    layouts[stored] = layer.layout
    features = {as_it_is: _features(description, as_it_is) for as_it_is in (False, True)}
    found = [
        fact
        for fact in engine_facts()
        if fact.form in layouts
        and fact.holds_for(scheme, layouts[fact.form], model_type, features[fact.form == stored])
    ]
    found.sort(key=lambda fact: _latest(fact.version), reverse=True)
    return sorted(found, key=lambda fact: (VERDICTS.index(fact.verdict), fact.form != stored))


def _features(description: Description, as_it_is: bool) -> set[str]:
    """Which of :data:`FEATURES` a checkpoint has: as it is, or with the config that a conversion writes."""
    found = {"float-experts"} if any(not layer.quantized for layer in description.moe_layers) else set()
    quantization = description.config.quantization
    if as_it_is and any(form.zero_point is not None for form, _, _ in description.modules.quantized()):
        found.add("zero-points")
    if as_it_is and isinstance(quantization, dict):
        if quantization.get("layer_type_quant_config"):
            found.add("layer-types")
        exclude = quantization.get("exclude")
        entries = [entry for entry in exclude if isinstance(entry, str)] if isinstance(exclude, list) else []
        if any(is_pattern(entry) and not entry.startswith("re:") for entry in entries):
            found.add("exclude-patterns")
    return found


def advice(stored: str | None, facts: Iterable[EngineFact]) -> str | None:
    """One line on what to do with a checkpoint, engine by engine; None where nothing is known.

    Args:
        stored: the form that it is in, of :func:`stored_form`.
        facts: what :func:`engines_for` found.
    """
    by_engine: dict[str, list[EngineFact]] = {}
    for fact in facts:
        by_engine.setdefault(fact.engine, []).append(fact)
    said = [_advice(engine, rows, stored) for engine, rows in by_engine.items()]
    return "; ".join(filter(None, said)) or None


def _advice(engine: str, facts: list[EngineFact], stored: str | None) -> str | None:
    """What to do for one engine: nothing, another release, a conversion, or give up."""
    as_it_is = [fact for fact in facts if fact.form == stored]
    good = next((fact for fact in facts if fact.verdict == "int8"), None)
    silent = [f"{fact.version} {_SILENTLY[fact.verdict]}" for fact in as_it_is if fact.verdict in _SILENTLY]
    name = ENGINE_NAMES.get(engine, engine)
    if good is None:
        return f"{name} {' and '.join(silent)}" if silent else None
    if good.form == stored:
        text = f"{name} {good.version} runs it in int8 as it is"
    else:
        text = f"for {name} {good.version} convert it to {good.form}"
    return f"{text} ({', '.join(silent)})" if silent else text


def _latest(version: str) -> tuple[int, ...]:
    """The last release of a range, to sort by: of ``0.28 - 0.33`` it is 0.33, ``>=0.28`` is later than any."""
    if version.startswith(">"):
        return (sys.maxsize,)
    return tuple(map(int, _RELEASE.findall(version)[-1].split(".")))


def stored_form(description: Description) -> str | None:
    """The form that a checkpoint is in, in the terms of the table; None when it is none of them."""
    method = description.declared.method if description.declared else None
    if method == "compressed-tensors":
        fused = description.moe_layers and description.moe_layers[0].layout == "fused"
        return "fused-int8" if fused else "compressed-tensors"
    return {"quark": "quark", "w8a8_int8": "w8a8-int8"}.get(method or "")


def _fact(row: dict[str, Any]) -> EngineFact:
    unknown = set(row) - {*_FIELDS, *_CONDITIONS, "checked"}
    if unknown or row["verdict"] not in VERDICTS:
        raise ValueError(f"engines.toml: a row for {row['engine']} is malformed")
    conditions = {key: tuple(row[key]) for key in _CONDITIONS if key in row}
    engine, version, form, verdict, note, evidence = (str(row[key]) for key in _FIELDS)
    checked = str(row.get("checked", ""))
    return EngineFact(engine, version, form, verdict, note, evidence, checked, **conditions)
