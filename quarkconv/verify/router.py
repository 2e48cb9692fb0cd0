"""The router of one layer: its tensors, and the choice of experts for the tokens of ``verify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quarkconv.experts.function import Routing, Unknown
from quarkconv.experts.knowledge import expert_routing, knowledge
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.router_tensors import fits_router, hidden_size, router_shapes, router_tensor_names
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.routing import RouterExtras, route, uniform_routing


@dataclass(frozen=True, slots=True)
class Router:
    """A model's routing and its tensors.

    Attributes:
        routing: how it routes.
        weight: [E, H], of the model's hidden size, which may differ from that of its experts' input.
        bias: the correction bias [E].
        extras: tensors that few routers have.
        table: int64 [vocabulary, k], the experts of each token id, in layers that choose by it.
    """

    routing: Routing
    weight: Tensor
    bias: Tensor | None = None
    extras: RouterExtras = RouterExtras()  # noqa: RUF009 - a tuple of None
    table: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [tensor for tensor in (self.weight, self.bias, *self.extras) if tensor is not None]

    def is_finite(self) -> bool:
        """Whether all of its tensors are finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    def to(self, device: torch.device) -> Router:
        """The same on a device."""
        weight, bias, *extras = (
            None if tensor is None else tensor.to(device) for tensor in (self.weight, self.bias, *self.extras)
        )
        assert weight is not None
        table = None if self.table is None else self.table.to(device)
        return Router(self.routing, weight, bias, RouterExtras(*extras), table)


def router_of(layer: MoELayer, config: Mapping[str, Any], reader: LayerReader) -> Router | Unknown:
    """The model's own router of a layer, or why it is not known.

    Args:
        layer: the layer.
        config: config.json.
        reader: reads the router's tensors.
    """
    routing = expert_routing(config, layer)
    if isinstance(routing, Unknown):
        return routing
    names = router_tensor_names(routing, layer.router_module, reader.has)
    for name, shape in router_shapes(routing, names, layer, hidden_size(knowledge(config, layer.moe))):
        if not reader.is_float(name):
            return Unknown(f"{name} is not stored in float" if reader.has(name) else f"{name} is not stored")
        found = reader.shape(name)
        if not fits_router(name, found, shape, names):
            return Unknown(f"{name} has shape {list(found)}, expected {list(shape)}")
    table = None if names.token_ids is None else _table(names.token_ids, routing, reader)
    if isinstance(table, Unknown):
        return table
    weight, bias, *extras = (None if name is None else reader.floats(name) for name in names[:-1])
    assert weight is not None
    return Router(routing, weight, None if bias is None else bias.flatten(), RouterExtras(*extras), table)


def _table(name: str, routing: Routing, reader: LayerReader) -> Tensor | Unknown:
    """The experts of each token id, or why they are not known."""
    if not reader.has(name):
        return Unknown(f"{name} is not stored")
    found = reader.tensors([name])[name]
    if found.is_floating_point() or found.dim() != 2 or found.shape[1] != routing.top_k or not len(found):
        return Unknown(f"{name} is {found.dtype} {list(found.shape)}, expected integers [vocabulary, {routing.top_k}]")
    if not 0 <= int(found.min()) <= int(found.max()) < routing.experts:
        return Unknown(f"{name} has numbers of experts that the layer does not have")
    return found.long()


def choose_experts(
    router: Router | Unknown, layer: MoELayer, top_k: int | None, hidden_states: Tensor, seed: int
) -> tuple[Tensor, Tensor, str]:
    """Choose experts as the model does, or at random where that is not known.

    Args:
        router: the model's router, or why it is not known.
        layer: the layer.
        top_k: experts per token in the config, for a random choice.
        hidden_states: [M, H].
        seed: of a random choice.

    Returns:
        Router weights float32 [M, k], expert ids int64 [M, k], and a description for people.
    """
    device = hidden_states.device
    generator = torch.Generator().manual_seed(seed)
    if isinstance(router, Router):
        width = router.weight.shape[1]
        if width != hidden_states.shape[1]:  # experts of a latent width: the router reads the wider hidden states
            hidden_states = torch.randn(len(hidden_states), width, generator=generator).to(device, hidden_states.dtype)
        router = router.to(device)
        chosen = None
        if router.table is not None:
            tokens = torch.randint(len(router.table), (len(hidden_states),), generator=generator)
            chosen = router.table[tokens.to(device)]
        weights, ids = route(router.routing, hidden_states, router.weight, router.bias, router.extras, chosen=chosen)
        return weights.contiguous(), ids.contiguous(), f"the model's own: {router.routing.describe()}"
    k = min(top_k or 2, layer.experts)
    weights, ids = uniform_routing(len(hidden_states), layer.experts, k, generator)
    description = f"uniform random top {k} of {layer.experts} (the model's own routing is unknown: {router.reason})"
    return weights.to(device), ids.to(device), description
