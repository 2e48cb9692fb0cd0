"""The runners of an evaluation, one for each device, with everything but the decoder layers filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from quarkconv.description.description import Description
from quarkconv.errors import UsageError
from quarkconv.evaluate.memory import experts_at_once
from quarkconv.evaluate.same_model import require_same_model
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.streams import LayerRunner, Model
from quarkconv.evaluate.weights import CheckpointWeights
from quarkconv.load.arenas import Arena, Memory
from quarkconv.load.layer_reads import LayerPart
from quarkconv.load.staging import Staging


def layer_runners(
    description: Description,
    original: Description | None,
    devices: Sequence[torch.device],
    layers: set[int] | None,
    stack: ExitStack,
) -> list[LayerRunner]:
    """A runner for each device, as :func:`layer_runner`; all run as many experts at a time."""
    group = _experts_at_once(description, original, devices)
    return [layer_runner(description, original, device, layers, stack, group) for device in devices]


def layer_runner(
    description: Description,
    original: Description | None,
    device: torch.device,
    layers: set[int] | None,
    stack: ExitStack,
    group: int | None = None,
) -> LayerRunner:
    """A runner with everything but the decoder layers filled.

    Args:
        description: the model that is evaluated.
        original: the model before quantization; None where there is none.
        device: where it runs.
        layers: decoder layers that run in INT8; None for all INT8 layers.
        stack: closes the files.
        group: how many routed experts of a layer are on the device at a time; None for all.

    Raises:
        UsageError: no such layer, or another model in ``original``.
        UnsupportedError: transformers has no class for the model.
        SourceError: a file cannot be read.
    """
    memory: Callable[[int], Memory] = Staging(device).memory if device.type == "cuda" else Arena
    quantized = _model(description, device, group, memory, stack)
    unquantized = None if original is None else _model(original, device, group, memory, stack)
    if unquantized is not None:
        require_same_model(quantized.skeleton, unquantized.skeleton)
    known = len(quantized.skeleton.layers)
    if layers is not None and not set() < layers <= set(range(known)):
        raise UsageError(
            "The decoder layer does not exist",
            expected=f"0 to {known - 1}",
            found=", ".join(map(str, sorted(layers - set(range(known))))) or "none",
        )
    runner = LayerRunner(quantized, unquantized, None if layers is None else frozenset(layers))
    runner.fill_rest()
    return runner


def _experts_at_once(
    description: Description, original: Description | None, devices: Sequence[torch.device]
) -> int | None:
    """How many experts of the largest layer are on each device at a time; None for all."""
    sizes = [(LayerPart(layer).nbytes, layer.experts) for layer in description.moe_layers]
    if not sizes:
        return None
    groups = (experts_at_once(device, *max(sizes), original is not None) for device in devices)
    return min((group for group in groups if group is not None), default=None)


def _model(
    description: Description,
    device: torch.device,
    group: int | None,
    memory: Callable[[int], Memory],
    stack: ExitStack,
) -> Model:
    skeleton = Skeleton(description.checkpoint.root, device, group)
    return Model(skeleton, stack.enter_context(CheckpointWeights(description, skeleton, memory)))
