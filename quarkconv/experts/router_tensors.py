"""The tensors of a router: their names and shapes, by the routing of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from quarkconv.experts.config_values import positive_int
from quarkconv.experts.family import Keys
from quarkconv.experts.function import Routing, Unknown
from quarkconv.experts.known import Known
from quarkconv.experts.layer import MoELayer


class RouterNames(NamedTuple):
    """Names of a router's tensors, None for those that it does not have: see :class:`RouterTensors`."""

    weight: str
    bias: str | None
    logit_bias: str | None = None
    input_scale: str | None = None
    expert_scale: str | None = None
    token_ids: str | None = None


def hidden_size(known: Known | Unknown) -> int | None:
    """Width of the hidden states that the routers of a stack of layers see, where it is not the experts' input's."""
    if isinstance(known, Unknown) or known.hidden_size() is None:
        return None
    return positive_int(known.config.get("hidden_size"))


def router_tensor_names(
    routing: Routing, moe_module: str, stored: Callable[[str], bool] = lambda _: False
) -> RouterNames:
    """Names of the router's tensors. Where exports name one differently, the one that is `stored` counts.

    `moe_module` holds the experts: `model.layers.1.mlp`, `model.layers.0.block_sparse_moe`, `model.layers.1.moe`.

    >>> router_tensor_names(Routing("mixtral", "softmax", 8, 2, True), "model.layers.0.block_sparse_moe")[:2]
    ('model.layers.0.block_sparse_moe.gate.weight', None)
    """

    def name(keys: Keys) -> str | None:
        names = [f"{moe_module}.{key}" for key in keys]
        return next(filter(stored, names), names[0] if names else None)

    tensors = routing.tensors
    bias = tensors.correction_bias or ((routing.bias_name,) if routing.bias_name is not None else ())
    bias = () if routing.by_token_id else bias
    return RouterNames(
        name(tensors.weight) or "",
        name(bias),
        name(tensors.logit_bias),
        name(tensors.input_scale),
        name(tensors.expert_scale),
        name(tensors.token_ids) if routing.by_token_id else None,
    )


def router_shapes(
    routing: Routing, names: RouterNames, layer: MoELayer, hidden_size: int | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each float tensor of a router.

    Args:
        routing: how the layer routes.
        names: of its tensors.
        layer: the layer.
        hidden_size: of :func:`hidden_size`.
    """
    rows = routing.experts + routing.zero_experts
    width = layer.hidden if hidden_size is None else hidden_size
    for name, shape in (
        (names.weight, (rows, width)),
        (names.bias, (rows,)),
        (names.logit_bias, (rows,)),
        (names.input_scale, (width,)),
        (names.expert_scale, (rows,)),
    ):
        if name is not None:
            yield name, shape


def fits_router(name: str, found: tuple[int, ...], shape: tuple[int, ...], names: RouterNames) -> bool:
    """Whether the stored shape of a router's tensor is the expected one; a correction bias may be [1, E]."""
    return found == shape or (name == names.bias and found == (1, *shape))
