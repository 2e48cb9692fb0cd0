"""The goldens of routing: a config of each family, and the routing that follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from quarkconv.experts.function import Routing, Unknown
from quarkconv.verify.routing import routing_of

DATA: Final = Path(__file__).parents[1] / "data" / "routing"
CASES: Final[dict[str, dict[str, Any]]] = json.loads((DATA / "goldens.json").read_text())["cases"]
EXPORTED: Final[dict[str, dict[str, object]]] = json.loads((DATA / "exported_configs.json").read_text())
"""config.json of Quark exports and of a 3-key fused checkpoint, without quantization_config."""

# A layer that does not route by token id, of the family whose first ones do.
LAYERS = {"deepseek_v4": 1}


def routing_from_config(config: object, experts: int, layer: int | None = None) -> Routing | None:
    """The routing, or None where there is a reason why it is not known, which names something."""
    routing = routing_of(config, experts, layer)
    if isinstance(routing, Unknown):
        assert routing.reason
        return None
    return routing


def golden_routing(name: str) -> Routing:
    routing = routing_from_config(CASES[name]["config"], CASES[name]["experts"], LAYERS.get(name))
    assert routing is not None
    return routing
