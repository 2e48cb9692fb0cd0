"""A loader of vLLM's (``load_format="filled"``) that fills parameters with values that depend on their names only.

Every backend then computes with the same weights, whatever it repacks them to. They are random, since kernels run
faster on zeros, and scaled so that activations keep their size from layer to layer.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

LOAD_FORMAT = "filled"
_DEVIATION = 73.6  # of uniform codes in -127..127
_LOGITS = 3.0  # deviation of the logits, so that log-probabilities differ from token to token


def register() -> None:
    """Register the loader; an entry point of ``vllm.general_plugins``."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class FilledLoader(BaseModelLoader):  # type: ignore[misc]
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            fill(model)

    register_model_loader(LOAD_FORMAT)(FilledLoader)


def fill(model: torch.nn.Module) -> None:
    """Fill every parameter of a model that vLLM has built and not processed yet."""
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            random = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{prefix}.{name}".encode()))
            weight = own.get(name.removesuffix("_scale"))
            if parameter.dtype == torch.int8:
                parameter.data.random_(-127, 128, generator=random)
            elif name.endswith("_scale") and weight is not None:
                parameter.data.uniform_(0.5, 1.5, generator=random).div_(_DEVIATION * weight.shape[-1] ** 0.5)
            elif "norm" in prefix.rpartition(".")[2]:
                parameter.data.fill_(1)
            elif "bias" in name:
                parameter.data.normal_(0, 0.01, generator=random)
            elif "embed" in prefix:
                parameter.data.normal_(0, 1, generator=random)
            else:
                gain = _LOGITS if "lm_head" in prefix else 1.0
                parameter.data.normal_(0, gain / parameter.shape[-1] ** 0.5, generator=random)


def write_entry_point(folder: Path) -> Path:
    """Metadata in `folder` by which vLLM finds the loader, if folder and this file's are on PYTHONPATH."""
    info = folder / "quarkconv_serve-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quarkconv-serve\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nquarkconv_serve = filled:register\n")
    return folder
