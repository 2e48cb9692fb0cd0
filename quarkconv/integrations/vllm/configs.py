"""vLLM's quantization configs "quark" and "compressed-tensors", with our method for INT8 MoE layers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

from quarkconv.integrations.vllm.method import replace_method


class QuarkconvCompressedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """vLLM's config of compressed-tensors; fused-int8 checkpoints have it too."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's method of a layer, replaced where it is one of INT8 W8A8 experts."""
        return replace_method(super().get_quant_method(layer, prefix))


class QuarkconvQuarkConfig(QuarkConfig):  # type: ignore[misc]
    """vLLM's config of Quark exports."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's method of a layer, replaced where it is one of INT8 W8A8 experts."""
        return replace_method(super().get_quant_method(layer, prefix))


def register_configs() -> None:
    """Put both in the place of vLLM's own."""
    register_quantization_config("compressed-tensors")(QuarkconvCompressedTensorsConfig)
    register_quantization_config("quark")(QuarkconvQuarkConfig)
