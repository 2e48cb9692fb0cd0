"""Write a tiny qwen3_moe with msModelSlim's own quantization functions and saver (W8A8_DYNAMIC), on the CPU.

msModelSlim's pipeline needs an NPU and transformers 4; its intermediate representation and its saver
(``AscendV1Saver``) do not. Here the modules of a model that transformers saved are quantized by ``calculate_qparam`` and
``quantize``, put into ``W8A8DynamicPerChannelFakeQuantLinear`` and saved.

  pip install llmcompressor==0.14.0.1 torchvision   (for torch 2.14.0, transformers 5.17.0)
  pip install --no-deps msmodelslim==26.1.0 pygtrie wcmatch bracex scipy
  python make_msmodelslim.py OUT_DIR
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from make_exports import CONFIGS
from msmodelslim import ir
from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Config, AscendV1Saver
from msmodelslim.ir.api import calculate_qparam, quantize
from msmodelslim.ir.qal import QDType, QScope, QStorage
from msmodelslim.model.interface import IModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM


class Adapter(IModel):
    """Says where the unquantized model is."""

    trust_remote_code = False
    model_type = "qwen3_moe"

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    @property
    def model_path(self) -> Path:
        return self._path


def quantized(weight: torch.Tensor) -> nn.Module:
    """A linear in W8A8_DYNAMIC."""
    wide = weight.float()
    parameters = calculate_qparam(wide.amin(1), wide.amax(1), QDType.INT8, QScope.PER_CHANNEL, True)
    codes = quantize(QStorage(QDType.FLOAT, wide).T, parameters).T
    return ir.W8A8DynamicPerChannelFakeQuantLinear(None, parameters, codes, None)


def tree(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules with the names of a checkpoint; every linear but lm_head and routers is quantized."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf, _ = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if leaf.endswith("_proj"):
            module.add_module(leaf, quantized(tensor))
        else:
            holder = nn.Module()
            holder.register_parameter("weight", nn.Parameter(tensor))
            module.add_module(leaf, holder)
    return root


def main(out: str) -> None:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"](), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        tensors = load_file(Path(source) / "model.safetensors")
        config = AscendV1Config(save_directory=out)
        saver = AscendV1Saver(tree(tensors), config, Adapter(source))
        saver.post_run()


if __name__ == "__main__":
    main(*sys.argv[1:])
