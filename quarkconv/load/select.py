"""MoE layers by number or by module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.experts.layer import MoELayer

LayerName = int | str
"""Number of a layer, or its module: ``model.layers.3.mlp.experts``, or ``model.layers.3.mlp`` around the experts."""

_SHOWN = 8


def select_layer(layers: Sequence[MoELayer], name: LayerName, file: str) -> MoELayer:
    """The layer of a number or module.

    Args:
        layers: the MoE layers of a checkpoint.
        name: number or module. A number that several layers share, such as those of a thinker and a talker, is refused.
        file: the checkpoint, for messages.

    Raises:
        UsageError: no layer has this number or module, or several have this number.
    """
    found = [layer for layer in layers if name in (layer.index, layer.prefix, layer.moe)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"Several MoE layers have number {name}",
            file=file,
            expected="the module of one of them",
            found=_listed(layer.moe for layer in found),
            hint="name the layer by its module",
        )
    by_number = isinstance(name, int) and len({layer.index for layer in layers}) == len(layers)
    known = _listed((str(layer.index) if by_number else layer.moe) for layer in layers)
    raise UsageError("No such MoE layer", file=file, expected=known or "none", found=str(name))


def select_layers(layers: Sequence[MoELayer], names: Iterable[LayerName] | None, file: str) -> tuple[MoELayer, ...]:
    """The layers of some numbers and modules, in the model's order; all of them for None.

    Raises:
        UsageError: as :func:`select_layer`.
    """
    if names is None:
        return tuple(layers)
    chosen = {select_layer(layers, name, file).prefix for name in sorted(names, key=str)}
    return tuple(layer for layer in layers if layer.prefix in chosen)


def check_loadable(layer: MoELayer) -> None:
    """Refuse a layer that cannot be loaded as int8 experts.

    Raises:
        UnsupportedError: its weights are not int8, a scale is missing or has the wrong shape, or the order of the rows
            of gate and up is not known.
    """
    if not layer.quantized or any(form.granularity is None for form in layer.all_forms):
        raise UnsupportedError(
            "The experts of this layer are not stored as int8 with scales",
            tensor=layer.prefix,
            found="/".join(sorted({form.weight.dtype for form in layer.all_forms})),
            hint="run `quarkconv inspect`",
        )
    if layer.interleaved is None:
        raise UnsupportedError(
            "The row order of gate and up in this layer is unknown",
            tensor=layer.prefix,
            expected="a model type whose order is known",
            hint="run `quarkconv inspect`",
        )


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
