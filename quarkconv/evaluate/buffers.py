"""The buffers of a model that no checkpoint holds, such as rotary frequencies."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from quarkconv.errors import UnsupportedError
from quarkconv.evaluate.request import VERIFY_INSTEAD


def compute_buffers(model: Any, stored: Container[str], root: Path, device: torch.device) -> None:
    """Compute them as transformers does.

    Args:
        model: a transformers model on the meta device.
        stored: names of its parameters, and of the buffers that checkpoints hold; those are not computed.
        root: directory of the checkpoint, for messages.
        device: where the buffers go.

    Raises:
        UnsupportedError: one depends on weights.
    """
    for name, module in model.named_modules():
        names = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names:
            continue
        for key in names:
            buffer = module._buffers[key]
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device)
        if name and any(f"{name}.{key}" in stored for key in names):
            continue
        with torch.no_grad():
            model._init_weights(module)
        for key in names:
            buffer = module._buffers[key]
            if buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any()):
                raise UnsupportedError(
                    "A buffer of this model cannot be computed without its weights",
                    file=str(root),
                    tensor=f"{name}.{key}",
                    hint=VERIFY_INSTEAD,
                )
