"""The runners of an evaluation, one for each device, with everything but the decoder layers filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from quarkconv.description.description import Description
from quarkconv.errors import UsageError
from quarkconv.evaluate.memory import experts_at_once
from quarkconv.evaluate.parameters import fill, share
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
    """A runner for each device, with everything but the decoder layers filled; all run as many experts at a time.

    Args:
        description: the model that is evaluated.
        original: the model before quantization; None where there is none.
        devices: where they run.
        layers: decoder layers that run in INT8; None for all INT8 layers.
        stack: closes the files.

    Raises:
        UsageError: no such layer, or another model in ``original``.
        UnsupportedError: transformers has no class for the model.
        SourceError: a file cannot be read.
    """
    group = _experts_at_once(description, original, devices)
    runners = [_empty_runner(description, original, device, layers, stack, group) for device in devices]
    _fill_rest(runners)
    return runners


def _empty_runner(
    description: Description,
    original: Description | None,
    device: torch.device,
    layers: set[int] | None,
    stack: ExitStack,
    group: int | None,
) -> LayerRunner:
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
    return LayerRunner(quantized, unquantized, None if layers is None else frozenset(layers))


def _fill_rest(runners: Sequence[LayerRunner]) -> None:
    """Fill what lies outside of the decoder layers: read once for all devices, one model while the other is filled."""
    with ThreadPoolExecutor(1, thread_name_prefix="quarkconv-read") as reader:
        rests = [reader.submit(model.weights.layer, None) for model in runners[0].models]
        for position, rest in enumerate(rests):
            weights = rest.result()
            for runner in runners:
                skeleton = runner.models[position].skeleton
                fill(skeleton, weights.on(skeleton.device).floats, None)
                if skeleton.device.type == "cuda":
                    torch.cuda.synchronize(skeleton.device)  # before its memory is read into again
    for runner in runners:
        if runner.unquantized is not None:
            share(runner.unquantized.skeleton, runner.quantized.skeleton)


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
