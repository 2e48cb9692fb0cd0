"""From the name of a device to a torch device that exists."""

from __future__ import annotations

import torch

from quarkconv.errors import UsageError


def pick_device(name: str | torch.device) -> torch.device:
    """The device of a name such as ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is a GPU where there is one.

    Raises:
        UsageError: the device is unknown, or missing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError("Unknown device", expected="auto, cpu or cuda", found=str(name))
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(
            "torch finds no such GPU",
            expected=str(name),
            found=f"{torch.cuda.device_count()} GPUs",
            hint="use --device cpu, or install a torch built for this machine's GPU",
        )
    return device


def pick_devices(name: str) -> tuple[torch.device, ...]:
    """The devices of a name: ``cuda``, and ``auto`` where there is a GPU, are all visible GPUs.

    Raises:
        UsageError: the device is unknown, or missing.
    """
    device = pick_device(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return (device,)
