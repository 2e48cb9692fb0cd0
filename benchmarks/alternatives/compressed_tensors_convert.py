"""A conversion of the same bytes by compressed-tensors' convert_checkpoint: scales become [out, 1], no expert is fused.

Usage: python compressed_tensors_convert.py SOURCE OUT
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.quantization import QuantizationConfig


class ScalesAsColumns:
    """A Converter that reshapes scales and leaves everything else as it is."""

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a file, scales as columns."""
        return {
            name: tensor.reshape(-1, 1) if name.endswith("weight_scale") else tensor for name, tensor in tensors.items()
        }

    def validate(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same on tensors without data."""
        return self.process(tensors)

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:
        """Nothing to say."""
        return config

    def update_model_config(self, model_config: dict[str, object]) -> dict[str, object]:
        """Nothing to change."""
        return model_config

    def get_dependencies(self, weight_name: str) -> set[str]:  # noqa: ARG002
        """A scale needs no other tensor."""
        return set()


if __name__ == "__main__":
    convert_checkpoint(sys.argv[1], sys.argv[2], ScalesAsColumns(), device="cpu")
