"""The rows of the table of engines that apply to a checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from itertools import chain
from typing import Final

from quarkconv.description.description import Description
from quarkconv.description.expert_names import (
    foreign_modules,
    foreign_projections,
    has_published_names,
    in_published_stack,
)
from quarkconv.experts.knowledge import foreign_class, named_classes
from quarkconv.experts.naming import ENGINE_NAMES
from quarkconv.inspection.engine_facts import (
    NOT_CHECKED,
    RUNS,
    VERDICTS,
    EngineFact,
    checked_classes,
    checked_in_one_release,
    checked_model_types,
    engine_facts,
)
from quarkconv.inspection.quark_in_vllm import is_read_otherwise
from quarkconv.scheme.patterns import is_pattern
from quarkconv.targets import get_target

FUSED: Final = "fused-int8"
_SHARED: Final = ".shared_experts."
"""Part of the names of shared experts where SGLang may compute them as routed ones."""
FUNCTION_NOTE: Final = "where the function of the layers is known"
"""End of the note of a row for settings that change what a layer computes, in a way that is not known."""
FP8_NOTE: Final = "without linears in FP8"
"""End of the note of a row that was never tried with them."""
CLASS_NOTE: Final = "with other model classes"
"""End of the note of a row that was never tried with the class in ``architectures``, by which engines choose one: a
class of a fork, of the language model of a wrapper by itself, or with another head, such as that of rewards."""
ARCHITECTURES_NOTE: Final = "with a class in architectures"
"""End of the note of a row for a config.json that names none. vLLM 0.33 then takes the base class of the model type,
without a head (``get_config``)."""
STACKS_NOTE: Final = "without other stacks of layers"
"""End of the note of a row that was never tried with modules of models that config.json does not describe."""
NAMES_NOTE: Final = "with the published names of experts"
"""End of the note of a row that was never tried with others."""
ENCODERS_NOTE: Final = "with encoders in float"
"""End of the note of a row that was never tried with int8 linears of encoders. SGLang 0.5.23 gives the encoder of
qwen3_vl_moe no quantization (``qwen3_vl.py``), and reads its codes as weights; vLLM's class quantizes it."""
TENSORS_NOTE: Final = "without tensors of unknown meaning"
"""End of the note of a row that was never tried with them: some loaders skip them, others fail."""
OUTPUTS_NOTE: Final = "with the scales of outputs that config.json declares"
"""End of the note of a row that was never tried with others, or without them."""
_OTHER_TENSORS: Final = {
    TENSORS_NOTE: {"tensor-unrecognised", "companion-unknown"},
    OUTPUTS_NOTE: {"output-scales"},
}
"""Note -> the findings about such tensors."""
_STACK: Final = re.compile(r".*?\.(?=\d+\.)")
"""The start of the names of a stack of layers, up to the number: ``model.language_model.layers.``"""
_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")


def engines_for(
    description: Description, converted_to: Collection[str], *, contradicted: bool, known: bool
) -> list[EngineFact]:
    """The rows that apply to a checkpoint as it is and after each conversion.

    Sorted by verdict; then GPUs before other devices, as it is before converted, later releases first.

    Args:
        description: the checkpoint.
        converted_to: the targets that it can be converted to.
        known: whether the function of all layers is known.
        contradicted: whether it has errors; what engines do with it as it is, is then unknown.
    """
    scheme = description.scheme
    if scheme is None or not description.int8_layers or not description.config.rank.is_whole:
        return []
    layer, stored = description.int8_layers[0], stored_form(description)
    model_type = model_type_of(description)
    layouts: dict[str | None, str] = dict.fromkeys(converted_to, description.unfused_layout(layer))
    layouts |= {FUSED: "fused"} if FUSED in layouts else {}
    layouts[stored] = layer.layout
    if contradicted:
        del layouts[stored]
    features = {as_it_is: _features(description, as_it_is) for as_it_is in (False, True)}
    row_type = {
        engine: model_type if _is_run_class(description, engine) else None
        for engine in dict.fromkeys(fact.engine for fact in engine_facts())
    }
    found = [
        fact
        for fact in engine_facts()
        if fact.form in layouts
        and fact.holds_for(scheme, layouts[fact.form], row_type[fact.engine], features[fact.form == stored])
    ]
    found = [fact for fact in found if not fact.int8_in_float or _has_int8_in_float(description, fact, stored)]
    of_modules = [fact for fact in found if fact.int8_in_float]
    found = [fact for fact in found if not any(_replaces(row, fact) for row in of_modules)]
    found = [fact for fact in found if _names_known(description, fact)]
    tried = checked_model_types()
    found = [
        fact if model_type in tried.get(fact.engine, (model_type,)) else fact.not_checked("with other model types")
        for fact in found
    ]
    class_note = CLASS_NOTE if named_classes(description.config) else ARCHITECTURES_NOTE
    found = [fact.not_checked(class_note) if row_type[fact.engine] is None else fact for fact in found]
    found = [_in_one_release(fact, model_type) for fact in found]
    renamed = model_type not in ENGINE_NAMES and not has_published_names(model_type, description.int8_layers)
    own_layers = (layer for layer in description.int8_layers if not description.is_mtp(layer.moe))
    renamed = renamed or not all(in_published_stack(model_type, layer) for layer in own_layers)
    found_codes = {item.code for item in description.findings}
    conditions = {
        FP8_NOTE: description.fp8,
        ENCODERS_NOTE: _has_int8_encoders(description),
        NAMES_NOTE: renamed,
        STACKS_NOTE: _has_other_stacks(description),
        **{note: not found_codes.isdisjoint(of_note) for note, of_note in _OTHER_TENSORS.items()},
        FUNCTION_NOTE: not known,
    }
    for note in (note for note, found_here in conditions.items() if found_here):
        found = [fact.not_checked(note) for fact in found]
    found.sort(key=lambda fact: _latest(fact.version), reverse=True)
    return sorted(found, key=lambda fact: (VERDICTS.index(fact.verdict), bool(fact.devices), fact.form != stored))


def _in_one_release(fact: EngineFact, model_type: str) -> EngineFact:
    """A row of several releases for a model type that only one of them was run with."""
    release, model_types = checked_in_one_release().get(fact.engine, ("", frozenset()))
    if fact.verdict not in RUNS or model_type not in model_types or model_type in fact.model_types:
        return fact
    if _covers(fact.version, release):
        return fact._replace(version=release)
    return fact.not_checked("with other model types")


def _covers(versions: str, release: str) -> bool:
    """Whether a row's versions, such as ``0.28 - 0.33`` or ``>=0.28``, include a release."""
    first, *rest = (tuple(map(int, found.split("."))) for found in _RELEASE.findall(versions))
    number = tuple(map(int, release.split(".")))
    if versions.startswith("<"):
        return number < first
    return first <= number and (versions.startswith(">") or number <= (rest[0] if rest else first))


def _has_int8_in_float(description: Description, fact: EngineFact, stored: str | None) -> bool:
    """Whether a linear that the engine of a row alone keeps in float is int8 in the form of the row."""
    names = set(description.float_modules_of.get(fact.engine, ()))
    if fact.form != stored:
        names.difference_update(get_target(fact.form).float_modules(description))
    return any(description.is_mtp(name) == (fact.int8_in_float == "mtp") for name in names)


def _replaces(row: EngineFact, fact: EngineFact) -> bool:
    """Whether a row about such modules holds in place of another, which was checked without them in int8."""
    return (
        (row.engine, row.form) == (fact.engine, fact.form)
        and not fact.int8_in_float
        and fact.verdict in (*RUNS, NOT_CHECKED)
        and (fact.devices == row.devices or row.verdict not in RUNS)
        and _covers(fact.version, row.version)
    )


def _names_known(description: Description, fact: EngineFact) -> bool:
    """Whether an engine that runs the other checkpoints of a row knows the names of this one's experts."""
    if fact.verdict not in RUNS:
        return True
    config, topology = description.config, description.topology
    if foreign_modules(config, topology):
        return False
    return not foreign_projections(config, topology) or fact.form == FUSED or "foreign-projections" in fact.having


def model_type_of(description: Description) -> str:
    """The model type that decides which class an engine loads: of a wrapper around a language model, the wrapper's."""
    outer = description.config.raw.get("model_type")
    return (outer if isinstance(outer, str) else description.config.model_type or "").removesuffix("_text")


def _features(description: Description, as_it_is: bool) -> set[str]:
    """Which of :data:`FEATURES` a checkpoint has: as it is, or with the config that a conversion writes."""
    found = {"float-experts"} if any(not layer.quantized for layer in description.moe_layers) else set()
    quantization = description.config.quantization
    if _shared_in_float(description):
        found.add("float-shared-experts")
    if any(layer.moe.endswith(".block_sparse_moe") for layer in description.moe_layers):
        found.add("block-sparse-names")
    if foreign_projections(description.config, description.topology):
        found.add("foreign-projections")
    if as_it_is and any(form.zero_point is not None for form, _, _ in description.modules.quantized()):
        found.add("zero-points")
    if as_it_is and isinstance(quantization, dict):
        if is_read_otherwise(description):
            found.add("unread-settings")
        if quantization.get("layer_type_quant_config"):
            found.add("layer-types")
        exclude = quantization.get("exclude")
        entries = [entry for entry in exclude if isinstance(entry, str)] if isinstance(exclude, list) else []
        if any(is_pattern(entry) and not entry.startswith("re:") for entry in entries):
            found.add("exclude-patterns")
    return found


def _is_run_class(description: Description, engine: str) -> bool:
    """Whether an engine was run with a class in ``architectures``; True also for model types it was not run with."""
    raw, types = description.config.raw, checked_classes().get(engine, {})
    if model_type_of(description) not in checked_model_types().get(engine, ()):
        return foreign_class(description.config) is None
    classes = types.get(str(raw.get("model_type")), frozenset())
    return not classes.isdisjoint(named_classes(description.config))


def _has_other_stacks(description: Description) -> bool:
    """Whether modules are of a model that config.json does not describe, such as a draft model."""
    layers = (layer.moe for layer in description.moe_layers)
    return any(description.config.part_of(name) is None for name in chain(layers, *description.others.values()))


def _has_int8_encoders(description: Description) -> bool:
    """Whether linears outside of the language model, such as those of an encoder of images, are int8."""
    found = (_STACK.match(layer.moe) for layer in description.moe_layers)
    stacks = tuple({match[0] for match in found if match is not None})
    dequantized = frozenset(description.float_modules)
    return bool(stacks) and any(
        not name.startswith(stacks) and name not in dequantized and not description.is_mtp(name)
        for (form, _), names in description.others.items()
        for name in (names if form.quantized else ())
    )


def _shared_in_float(description: Description) -> bool:
    """Whether a layer whose routed experts are in int8 has a shared expert in float."""
    layers = {layer.moe for layer in description.int8_layers}
    names = (name for (form, _), modules in description.others.items() if form.is_float for name in modules)
    return any(name.partition(_SHARED)[0] in layers for name in names if _SHARED in name)


def _latest(version: str) -> tuple[int, ...]:
    """The last release of a range, to sort by: 0.33 of ``0.28 - 0.33``; ``>=0.28`` is later than any."""
    if version.startswith(">") or version == "main":
        return (sys.maxsize,)
    return tuple(map(int, _RELEASE.findall(version)[-1].split(".")))


def stored_form(description: Description) -> str | None:
    """The form of a checkpoint, as the table names it; None for forms outside the table."""
    method = description.declared.method if description.declared else None
    if any(layer.paired for layer in description.moe_layers):
        return None
    if method == "compressed-tensors":
        fused = description.moe_layers and description.moe_layers[0].layout == "fused"
        return FUSED if fused else "compressed-tensors"
    return {"quark": "quark", "w8a8_int8": "w8a8-int8", "ascend": "ascend"}.get(method or "")
