"""Names of the files of a checkpoint beside its shards."""

from __future__ import annotations

from typing import Final

CONFIG_NAME: Final = "config.json"
INDEX_NAME: Final = "model.safetensors.index.json"
ASCEND_NAME: Final = "quant_model_description.json"
"""The quantization of each tensor, in the format of Ascend's msModelSlim."""
MODELOPT_NAME: Final = "hf_quant_config.json"
"""The quantization of the model, in the format of NVIDIA's ModelOpt."""
MANIFEST_NAME: Final = "quarkconv.json"
"""The manifest of a conversion; see :mod:`quarkconv.plan.manifest`. A finished output has it."""
