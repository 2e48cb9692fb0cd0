"""How much of a device's memory each part of an evaluation takes: by its size, so that a run repeats to the bit."""

from __future__ import annotations

from typing import Final

import torch

CPU_BATCH: Final = 4096
"""Tokens of a batch on a CPU, where ``batch`` is not given."""
GPU_BATCH: Final = 32768
"""The same on a GPU with enough memory: it waits for the host between the kernels of small batches."""
_BATCH_SHARE: Final = 16
"""The inputs, products and outputs of a batch's experts take one of so many parts of a GPU's memory."""
_WORK_SHARE: Final = 0.3
"""A batch, its logits and what the allocator cannot use take this part; hidden states what layers leave of the rest."""
_LOGITS_SHARE: Final = 32
"""Logits of one model take one of so many parts."""
_CPU_LOGITS: Final = 2**26
_MOST_LOGITS: Final = 2**31 - 1
"""Elements of a tensor that every kernel can count."""
_LAYERS_SHARE: Final = 0.6
"""Layers may take this part of a GPU's memory; else experts stay in the host's, and a group of them is on the GPU."""
_GROUP_SHARE: Final = 8
"""A group of experts takes one of so many parts."""
_ONE: Final = 3
"""Bytes of a weight of a group, as codes and as floats."""
_WIDE: Final = 2
"""Bytes of an element of states and logits."""


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU that this process may take."""
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)  # not in every release of torch
    return int(total * fraction(device))


def batch_tokens(device: torch.device, hidden: int, top_k: int) -> int:
    """Tokens of a batch.

    Args:
        device: where it runs.
        hidden: H.
        top_k: experts per token: four tensors [tokens * top_k, H] are held at a time.
    """
    if device.type != "cuda":
        return CPU_BATCH
    token = 4 * top_k * hidden * _WIDE
    return min(GPU_BATCH, device_bytes(device) // _BATCH_SHARE // token)


def layers_bytes(elements: int, unquantized: bool, part: float = 1.0) -> int:
    """What two layers of each model take on a device, the one that runs and the next one.

    The layer that runs takes a byte for each weight as codes, two as 16-bit floats, and two in the unquantized model.
    The next one is filled meanwhile: that of the unquantized model takes two bytes as it is read, and up to three while
    matrices of experts are joined, beside the codes that are read then. Floats of the codes follow when it is done.

    Args:
        elements: weights of all routed experts of the largest layer.
        unquantized: there is a model before quantization.
        part: of the experts that are on the device at a time; the others stay in the host's memory.
    """
    return elements * (11 if unquantized else 6) if part == 1 else int(elements * part) * 2 * _ONE


def experts_at_once(device: torch.device, elements: int, experts: int, unquantized: bool) -> int | None:
    """How many experts of a layer are on the device at a time; None for all.

    Args:
        device: where they run.
        elements, unquantized: as of :func:`layers_bytes`.
        experts: how many experts the layer has.
    """
    if device.type != "cuda":
        return None
    if layers_bytes(elements, unquantized) <= device_bytes(device) * _LAYERS_SHARE:
        return None
    one = elements // experts * _ONE
    return max(1, min(experts, device_bytes(device) // _GROUP_SHARE // one))


def states_bytes(device: torch.device, layers: int, copies: int) -> int:
    """Hidden states that stay on a GPU. Where they stay changes no figure.

    Args:
        device: with everything but the decoder layers.
        layers: what these will take.
        copies: how many there are of a hidden state: two while one is written to the disk and another takes its place.
    """
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    allowed = device_bytes(device) - torch.cuda.memory_allocated(device)
    free = min(torch.cuda.mem_get_info(device)[0] + cached, allowed)
    return max(0, free - layers - int(device_bytes(device) * _WORK_SHARE)) // copies


def block_logits(device: torch.device) -> int:
    """Logits of one model that are in memory at a time. Small blocks leave a GPU waiting for the host, which runs the
    model's forward pass around the layers for each of them."""
    return min(_MOST_LOGITS, device_bytes(device) // _LOGITS_SHARE // _WIDE) if device.type == "cuda" else _CPU_LOGITS
