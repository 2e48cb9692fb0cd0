"""Findings about what a checkpoint computes beside its weights: rotations at run time, layers that are not stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from quarkconv.experts.config import ModelConfig
from quarkconv.findings import Finding, finding
from quarkconv.scheme.stored import ROTATION, StoredModules
from quarkconv.text import plural

_ONLINE: Final = ("online_r1_rotation", "r3", "r4")
"""Rotations of Quark that are computed at run time; r1 and r2 are merged into the weights (``RotationConfig``)."""


def function_findings(
    config: ModelConfig, stored: StoredModules, names: Iterable[str], is_mtp: Callable[[str], bool]
) -> Iterator[Finding]:
    """The findings about what a checkpoint computes beside its weights.

    Args:
        config: the config.
        stored: the modules.
        names: all tensors.
        is_mtp: a test of names, see :func:`quarkconv.description.mtp.mtp_test`.
    """
    rotations = [name for name in stored.plain if name.endswith(ROTATION)]
    settings = list(_online_settings(config.quantization))
    if rotations or settings:
        subject = rotations[0] if rotations else f"quantization_config.{settings[0]}"
        rotations_found = (
            f"{plural(len(rotations), 'rotation')} stored beside weights"
            if rotations
            else "rotations computed at run time"
        )
        yield finding(
            "rotation-online",
            subject,
            f"The inputs of quantized modules are rotated online: {rotations_found}"
            + (f" ({', '.join(settings)})" if settings else ""),
            hint="engines do not rotate: quantize the model again without online rotations",
            count=max(len(rotations), 1),
        )
    if config.mtp_layers and not any(map(is_mtp, names)):
        yield finding(
            "mtp-missing",
            "config.json",
            f"config.json declares {plural(config.mtp_layers, 'layer')} of multi-token prediction that are not stored",
            hint="engines cannot draft tokens with this checkpoint; --mtp drop removes them from config.json",
            count=config.mtp_layers,
        )


def _online_settings(quantization: object) -> Iterator[str]:
    """The settings of a quantization_config that rotate activations at run time."""
    if not isinstance(quantization, dict):
        return
    algorithms = quantization.get("algo_config")
    for number, algorithm in enumerate(algorithms if isinstance(algorithms, list) else [algorithms]):
        if isinstance(algorithm, dict) and _rotates(algorithm):
            yield f"algo_config[{number}]"


def _rotates(algorithm: dict[str, Any]) -> bool:
    online = algorithm.get("online_config")
    layers = online.get("online_rotation_layers") if isinstance(online, dict) else None
    return any(algorithm.get(key) is True for key in _ONLINE) or bool(layers)
