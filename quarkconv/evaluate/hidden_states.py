"""Hidden states of all batches between two layers, and their copies to and from a device.

As many batches stay on a GPU as layers and a batch leave room for. The others stay in page-locked memory of the host,
and are copied while another batch runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quarkconv.evaluate.sums import LayerSums

_IN_FLIGHT: Final = 2
"""Batches whose outputs are being copied to the host: the device holds no more of them."""


class LayerOutput(NamedTuple):
    """Output of a decoder layer for one batch.

    Attributes:
        states: hidden states, [B, L, H].
        handed_on: a second output that the next layer may take.
    """

    states: Tensor
    handed_on: Tensor | None = None

    def to(self, device: torch.device) -> LayerOutput:
        """The same on a device."""
        return LayerOutput(self.states.to(device), None if self.handed_on is None else self.handed_on.to(device))


@dataclass(slots=True)
class Streams:
    """Outputs of a layer, for every variant of the model.

    Attributes:
        outputs: variant -> output for each batch, on a device or on the CPU.
        finished: number of layers.
        sums: of each of them.
    """

    outputs: dict[str, list[LayerOutput]]
    finished: int = 0
    sums: list[LayerSums] = field(default_factory=list)

    def of(self, batch: int) -> dict[str, LayerOutput]:
        """Variant -> output for a batch."""
        return {name: outputs[batch] for name, outputs in self.outputs.items()}

    def states(self, variant: str) -> Tensor:
        """Hidden states of all windows, [W, L, H] on the CPU."""
        return torch.cat([item.states.cpu() for item in self.outputs[variant]])

    def copy(self) -> Streams:
        """The same, whatever the next layer writes to page-locked memory."""
        outputs = {
            name: [item._replace(states=item.states.clone()) if _is_locked(item) else item for item in items]
            for name, items in self.outputs.items()
        }
        return Streams(outputs, self.finished, list(self.sums))


class Transfers:
    """Copies hidden states between a device and where they stay.

    Args:
        device: where batches run.
        limit: bytes of hidden states that stay on it, if it is a GPU.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            self._left = limit
            self._inward, self._outward = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
            self._fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._leaving: deque[torch.cuda.Event] = deque()

    def keep(self, output: LayerOutput) -> LayerOutput:
        """The same where this batch of this variant stays."""
        if not self._is_gpu or output.states.nbytes <= self._left:
            if self._is_gpu:
                self._left -= output.states.nbytes
            return output.to(self._device)
        locked = torch.empty(output.states.shape, dtype=output.states.dtype, pin_memory=True)
        return LayerOutput(locked.copy_(output.states), output.handed_on)

    def fetch(self, outputs: Mapping[str, LayerOutput]) -> dict[str, LayerOutput]:
        """Begin to copy a batch to the device. It may be read there after :meth:`wait`."""
        if not self._is_gpu:
            return dict(outputs)
        found = {}
        self._inward.wait_stream(torch.cuda.current_stream(self._device))  # that memory may still be read
        for name, item in outputs.items():
            states = item.states
            if states.device != self._device:
                states = torch.empty(states.shape, dtype=states.dtype, device=self._device)
                with torch.cuda.stream(self._inward):
                    states.copy_(item.states, non_blocking=True)
            found[name] = LayerOutput(states, None if item.handed_on is None else item.handed_on.to(self._device))
        self._fetched.record(self._inward)
        return found

    def wait(self) -> None:
        """Have the kernels that follow wait for the batch that was fetched last."""
        if self._is_gpu:
            torch.cuda.current_stream(self._device).wait_event(self._fetched)

    def store(self, before: LayerOutput, output: LayerOutput) -> LayerOutput:
        """Begin to copy the output of a layer to where its input was, and return it there."""
        if before.states.device == output.states.device:
            return output
        if len(self._leaving) == _IN_FLIGHT * 3:
            self._leaving.popleft().synchronize()
        locked = before.states
        if locked.shape != output.states.shape or locked.dtype != output.states.dtype:
            locked = torch.empty(output.states.shape, dtype=output.states.dtype, pin_memory=True)
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            locked.copy_(output.states, non_blocking=True)
            output.states.record_stream(self._outward)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._outward)
        self._leaving.append(copied)
        return output._replace(states=locked)

    def finish(self) -> None:
        """Wait for all copies to the host."""
        if self._is_gpu:
            self._outward.synchronize()
            self._leaving.clear()


def _is_locked(output: LayerOutput) -> bool:
    return output.states.device.type == "cpu" and torch.cuda.is_available() and output.states.is_pinned()
