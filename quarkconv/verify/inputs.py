"""Hidden states for checking a layer: random, with and without outlier channels, or recorded.

Plain Gaussians favour 8 bits: the largest of H values is about four times their root mean square. In real models a few
channels are tens of times larger than the rest, in every token (Dettmers et al., LLM.int8(), 2022), and the rest has
heavier tails. Half of the random tokens are of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from quarkconv.defects import unreadable_safetensors
from quarkconv.errors import UsageError
from quarkconv.experts.layer import MoELayer
from quarkconv.load.experts import FusedExperts
from quarkconv.verify.reference import CODE_MAX

DTYPE: Final = torch.bfloat16
OUTLIER_SHARE: Final = 1 / 1024
"""Share of the channels that are outliers, at least one."""
OUTLIER_FACTOR: Final = 30.0
"""Their size relative to the other channels."""
TAIL_FREEDOM: Final = 5
"""Degrees of freedom of Student's t, from which the other channels are drawn."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hidden states of one layer.

    Attributes:
        states: bfloat16 [M, H]; first the plain ones, then those with outliers.
        plain: number of plain ones.
        description: for people.
    """

    states: Tensor
    plain: int
    description: str


def random_inputs(experts: FusedExperts, tokens: int, seed: int) -> Inputs:
    """Random hidden states, the second half of them with outlier channels.

    Under static scales all are Gaussian, scaled to the range of the scale, which was calibrated on other inputs.
    """
    generator = torch.Generator().manual_seed(seed + 7919 * experts.layer)
    hidden = experts.hidden_size
    static = experts.w13_input_scale
    heavy = tokens // 2 if static is None else 0
    plain = torch.randn(tokens - heavy, hidden, generator=generator)
    parts = [plain]
    if heavy:
        normal = torch.randn(heavy, hidden, generator=generator)
        squares = torch.randn(TAIL_FREEDOM, heavy, hidden, generator=generator).square().mean(dim=0)
        tails = normal / squares.sqrt()
        channels = torch.randperm(hidden, generator=generator)[: max(1, round(hidden * OUTLIER_SHARE))]
        tails[:, channels] *= OUTLIER_FACTOR
        parts.append(tails)
    if static is not None:
        parts = [plain * (CODE_MAX * static.min().item() / plain.abs().max().clamp(min=1e-6))]
    description = "random: Gaussian" + (", and with outlier channels" if heavy else "")
    return Inputs(torch.cat(parts).to(experts.w13.device, DTYPE), len(plain), description)


def plain_inputs(experts: FusedExperts, tokens: int, seed: int) -> Tensor:
    """Gaussian hidden states, bfloat16 [tokens, H]."""
    return random_inputs(experts, 2 * tokens, seed).states[:tokens]


class RecordedInputs:
    """Hidden states that were recorded from a model, in a safetensors file.

    A tensor [..., H] of floats for each MoE layer, named as its module (``model.layers.3.mlp``), as its experts or as
    its number (``3``); or one named ``hidden_states`` for all layers.

    Raises:
        SourceError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as handle:
                self._names = set(handle.keys())
        except Exception as error:  # safetensors raises its own type for headers, OSError for the rest
            raise unreadable_safetensors("The recorded activations cannot be read", path, error) from error

    def name_for(self, layer: MoELayer) -> str | None:
        """The tensor of a layer."""
        names = (layer.moe, layer.prefix, str(layer.index), "hidden_states")
        return next((name for name in names if name in self._names), None)

    def check(self, layers: Sequence[MoELayer]) -> None:
        """Check that the file has a tensor of the right shape and dtype for each layer.

        Raises:
            UsageError: a tensor is missing, ambiguous, or has the wrong shape or dtype.
        """
        by_number = [layer for layer in layers if self.name_for(layer) == str(layer.index)]
        if len({layer.index for layer in by_number}) < len(by_number):
            raise UsageError(
                "The number of a recorded tensor fits several MoE layers",
                file=str(self.path),
                tensor=str(by_number[0].index),
                hint="name the tensors by module",
            )
        with safe_open(self.path, framework="pt") as handle:
            for layer in layers:
                name = self.name_for(layer)
                if name is None:
                    raise UsageError(
                        "The recorded activations of a layer are missing",
                        file=str(self.path),
                        tensor=layer.moe,
                        expected=f"a tensor {layer.moe}, {layer.index} or hidden_states",
                        found=", ".join(sorted(self._names)[:3]) or "no tensors",
                        hint="record it, or choose the layers to check with --layers",
                    )
                part = handle.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                rows = math.prod(shape[:-1]) if shape else 0
                if not shape or shape[-1] != layer.hidden or not rows or dtype not in ("F32", "BF16", "F16"):
                    raise UsageError(
                        "The recorded activations of a layer have the wrong shape or dtype",
                        file=str(self.path),
                        tensor=name,
                        expected=f"floats [..., {layer.hidden}]",
                        found=f"{dtype} {shape}",
                    )

    def inputs(self, layer: MoELayer, tokens: int, device: torch.device) -> Inputs:
        """The first ``tokens`` hidden states of a layer, or as many as there are."""
        name = self.name_for(layer)
        with safe_open(self.path, framework="pt") as handle:
            states: Tensor = handle.get_tensor(name)
        states = states.reshape(-1, layer.hidden)[:tokens]
        return Inputs(states.to(device, DTYPE), len(states), f"recorded: {self.path.name}, {name}")
