"""Findings about what a checkpoint computes beside its weights: rotations and factors at run time, missing layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from quarkconv.experts.config import ModelConfig
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.topology import Topology
from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.scheme.companions import OUTPUT_SCALES
from quarkconv.scheme.form import BLOCK_SCALE, ROTATION
from quarkconv.scheme.patterns import TimeLimit, name_filter
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural, shortened

_MTP_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|mtp|mtp_layers)\.(\d+)\.")
"""The number of a layer of multi-token prediction, in the name of a tensor of it."""
_AT_RUN_TIME: Final = ("input", "output")
"""Locations of transforms that are not merged into weights (``TransformLocation`` of compressed-tensors)."""
_KNOWN: Final = frozenset(
    {"bias", BLOCK_SCALE.removeprefix("."), *(scale.removeprefix(".") for scale in OUTPUT_SCALES)}
)
"""Last parts of the names of tensors below an int8 module that are not companions of its weight."""
_FACTORS: Final = re.compile(r"smooth|pre_?quant|awq|^act_scales?$|^input_factors?$")
"""Names of factors of inputs: SmoothQuant's and AWQ's where they are not merged (``pre_quant_scale`` of ModelOpt)."""
_ROTATES: Final = re.compile(r"online[-_ ]?(?:rotat|full_had|had)|hadamard|quarot|spinquant", re.IGNORECASE)
"""Names of settings in config.json, beside quantization_config, that rotate activations at run time."""
_ONLINE: Final = ("online_r1_rotation", "r3", "r4")
"""Rotations of Quark that are computed at run time; r1 and r2 are merged into the weights (``RotationConfig``)."""


def function_findings(
    config: ModelConfig,
    stored: StoredModules,
    names: Iterable[str],
    is_mtp: Callable[[str], bool],
    is_float: Callable[[str], bool],
) -> Iterator[Finding]:
    """The findings about what a checkpoint computes beside its weights.

    Args:
        config: the config.
        stored: the modules.
        names: all tensors.
        is_mtp: a test of names, see :func:`quarkconv.description.mtp.mtp_test`.
        is_float: a test of modules, see :func:`quarkconv.description.float_modules.float_test`.
    """
    rotations = [name for name in stored.plain if name.endswith(ROTATION)]
    settings = [*_online_settings(config.quantization), *_online_transforms(config.quantization, stored)]
    beside = [shortened(key) for key, value in config.raw.items() if value and _ROTATES.search(key)]
    if rotations or settings or beside:
        subject = [*rotations, *(f"quantization_config.{name}" for name in settings), *beside][0]
        rotations_found = (
            f"{plural(len(rotations), 'rotation')} stored beside weights"
            if rotations
            else "rotations computed at run time"
        )
        yield finding(
            "rotation-online",
            subject,
            f"The model rotates inputs of quantized modules: {rotations_found}"
            + (f" ({', '.join((*settings, *beside))})" if settings or beside else ""),
            hint="engines do not rotate: quantize the model again without online rotations",
            count=max(len(rotations), 1),
        )
    yield from _companions(stored, is_float)
    yield from _missing_mtp(config, filter(is_mtp, names))


def _missing_mtp(config: ModelConfig, stored: Iterator[str]) -> Iterator[Finding]:
    """The finding about layers of multi-token prediction that are declared, and not among the tensors of these."""
    declared = config.mtp_layers or 0
    first = next(stored, None) if declared else None  # mostly one layer is declared, and the first tensor shows it
    missing = declared if first is None else 0
    if first is not None and declared > 1:
        numbers = {match[1] for name in (first, *stored) if (match := _MTP_LAYER.search(name)) is not None}
        missing = declared - len(numbers) if numbers else 0
    if missing > 0:
        yield finding(
            "mtp-missing",
            "config.json",
            f"{plural(declared, 'multi-token prediction layer')} declared by config.json, but {missing} not stored",
            hint="engines cannot draft tokens with these layers; --mtp drop removes them from config.json",
            count=missing,
        )


def _companions(stored: StoredModules, is_float: Callable[[str], bool]) -> Iterator[Finding]:
    """Tensors beside int8 weights that engines do not read: factors of inputs, and those of unknown meaning."""
    beside = [name for name in (*stored.plain, *stored.unrecognised) if _is_beside_codes(name, stored)]
    factors = [name for name in beside if _FACTORS.search(name.rpartition(".")[2])]
    others = frozenset(beside).difference(factors, stored.unrecognised)
    unknown = [name for name in beside if name in others and not is_float(name.rpartition(".")[0])]
    unknown += [name for name in stored.integer_biases if name not in stored.unrecognised]
    yield from FindingsAbout(
        "smoothing-online",
        factors,
        f"{plural(len(factors), 'tensor')} of factors that multiply the inputs of quantized modules at run time",
        hint="engines do not apply them: quantize the model again with factors merged into the weights",
    )
    yield from FindingsAbout(
        "companion-unknown",
        unknown,
        f"{plural(len(unknown), 'tensor')} of unknown meaning beside int8 weights",
        hint="conversion copies them as they are; engines may drop them, or compute something else",
    )


def with_companions(topology: Topology, stored: StoredModules) -> Topology:
    """The same layers; those with tensors of unknown meaning beside the weights of their experts know of one.

    Factors of inputs are not among them: their meaning is known.
    """
    beside = [
        name
        for name in (*stored.plain, *stored.unrecognised)
        if _is_beside_codes(name, stored) and not _FACTORS.search(name.rpartition(".")[2])
    ]
    if not beside:
        return topology

    def first(layer: MoELayer) -> str:
        return layer.beside or next((name for name in beside if name.startswith(f"{layer.prefix}.")), "")

    return topology._replace(layers=tuple(replace(layer, beside=first(layer)) for layer in topology.layers))


def _is_beside_codes(name: str, stored: StoredModules) -> bool:
    """Whether a tensor is below an int8 module, and none that such modules are known to have."""
    module, _, leaf = name.rpartition(".")
    form = stored.linears.get(module)
    return form is not None and form.quantized and leaf not in _KNOWN and not leaf.endswith(ROTATION)


def _online_settings(quantization: object) -> Iterator[str]:
    """The settings of a quantization_config that rotate activations at run time."""
    if not isinstance(quantization, dict):
        return
    algorithms = quantization.get("algo_config")
    for number, algorithm in enumerate(algorithms if isinstance(algorithms, list) else [algorithms]):
        if isinstance(algorithm, dict) and _rotates(algorithm):
            yield f"algo_config[{number}]"


def _online_transforms(quantization: object, stored: StoredModules) -> Iterator[str]:
    """The transforms of a compressed-tensors config that are applied at run time to routed experts.

    Engines apply those of other linears (``CompressedTensorsLinearTransformMethod`` of vLLM), none of experts.
    """
    transforms = quantization.get("transform_config") if isinstance(quantization, dict) else None
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    if not isinstance(groups, dict):
        return
    experts = [name for name, form in stored if form.quantized and ".experts." in name]
    for key, group in groups.items():
        applied = group.get("apply") if isinstance(group, dict) else None
        for item in applied if isinstance(applied, list) else ():
            if isinstance(item, dict) and item.get("location") in _AT_RUN_TIME and _concerns(item, experts):
                yield f"transform_config.config_groups.{shortened(str(key))}"
                break


def _concerns(item: dict[str, Any], modules: list[str]) -> bool:
    """Whether a transform is of one of some modules."""
    targets, ignored = (item.get(key) for key in ("targets", "ignore"))
    named = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
    left_out = [name for name in ignored if isinstance(name, str)] if isinstance(ignored, list) else []
    limit = TimeLimit()
    is_target = name_filter(named, globs=False, limit=limit)
    is_left_out = name_filter(left_out, globs=False, limit=limit)
    return any(("Linear" in named or is_target(module)) and not is_left_out(module) for module in modules)


def _rotates(algorithm: dict[str, Any]) -> bool:
    online = algorithm.get("online_config")
    layers = online.get("online_rotation_layers") if isinstance(online, dict) else None
    return any(algorithm.get(key) is True for key in _ONLINE) or bool(layers)
