"""AMD Quark's own loader on the target ``quark``, and on what Quark exported.

Quark 0.13 imports into classes with experts one by one, as those of transformers 4. It insists on zero points, which
exports of Quark 0.13 written file to file do not have: Quark cannot import those, and neither ours. With zero points of
zero beside the codes, both import, and are the same model.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.expected import fill
from quark.torch import import_model_from_safetensors
from quark.torch.export.main_export.quant_config_parser import get_layer_quant_config
from quark.torch.quantization.config.config import QConfig
from support.checkpoints import Tensors, edit_checkpoint, load
from support.exports import Checkpoints
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import quarkconv

FILE_TO_FILE = (
    "qwen3_moe-quark0.13-f2f",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "deepseek_v3-0.13-f2f-mtp",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen2_moe-0.13-f2f-shared_expert",
    "qwen3_5_moe-0.13-f2f-language_model",
    "qwen3_moe-0.13-f2f-layer_excluded",
)
"""Exports of the form that the target writes: ptpc_int8 of Quark 0.13, file to file."""

EAGER = (
    "mixtral-quark0.11-eager",
    "qwen2_moe-0.11-eager-shared_expert",
    "qwen3_moe-0.11-eager-sharded",
    "qwen3_moe-quark0.11-eager-int8_static",
    "qwen3_moe-0.11-eager-kv_cache_fp8",
)
"""Exports of a model in memory, by Quark 0.11: zero points, scales in BF16."""

IMPORTED = (*EAGER, "qwen3_moe-quark0.13-f2f", "qwen3_moe-quark0.13-f2f-per_tensor_weight", "deepseek_v3-quark0.13-f2f",
            "glm4_moe-0.13-f2f-experts_only", "qwen2_moe-0.13-f2f-shared_expert")  # fmt: skip
"""Those that transformers 4 has classes for."""


class Converted:
    """Exports, and what comes back from fused-int8, made once."""

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        self._checkpoints = checkpoints
        self._folder = folder
        self.source = cache(self._source)
        self.back = cache(self._back)

    def _source(self, name: str) -> Path:
        source = fill(self._checkpoints.copy(name, self._folder / "source" / name))
        path = source / "config.json"
        config = json.loads(path.read_text())
        older = {"num_experts": config.get("num_local_experts"), **config.get("rope_parameters", {})}
        path.write_text(json.dumps({**older, **config}))  # names that transformers 4 has for the same
        return source

    def _back(self, name: str) -> Path:
        fused = quarkconv.convert_checkpoint(self.source(name), "fused-int8", self._folder / "fused" / name, jobs=1)
        return quarkconv.convert_checkpoint(fused.output, "quark", self._folder / "back" / name, jobs=1).output


@pytest.fixture(scope="module")
def converted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(checkpoints, tmp_path_factory.mktemp("quark"))


def imported(folder: Path) -> PreTrainedModel:
    """The model that Quark makes of a checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found: PreTrainedModel = import_model_from_safetensors(model, str(folder)).eval()
    return found


def with_zero_points(folder: Path) -> Path:
    """Add the zero points that a checkpoint lacks, and store scales as F32."""

    def complete(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("weight_scale", "input_scale"))]:
            tensors[name] = tensors[name].float()
            zeros = torch.zeros(tensors[name].shape, dtype=torch.int8)
            tensors.setdefault(name.replace("_scale", "_zero_point"), zeros)

    edit_checkpoint(folder, complete)
    return folder


def kept_in_float(tensor: str) -> bool:
    """Whether a tensor belongs to a module of prediction layers that vLLM keeps in float; conversion dequantizes it."""
    return any(f".{module}." in tensor for module in ("eh_proj", "shared_head.head"))


@pytest.mark.parametrize("name", FILE_TO_FILE)
def test_what_comes_back_is_what_quark_exported(converted: Converted, name: str) -> None:
    """Every tensor by name, dtype, shape and bytes; but for int8 modules that engines keep in float."""
    source, back = load(converted.source(name)), load(converted.back(name))
    in_float = {key for key in source if kept_in_float(key)}
    assert {key for key in source if key not in in_float} == {key for key in back if not kept_in_float(key)}
    assert all(tensor.dtype == torch.bfloat16 for key, tensor in back.items() if kept_in_float(key))
    for key, tensor in source.items():
        if key in in_float:
            continue
        assert (tensor.dtype, tensor.shape) == (back[key].dtype, back[key].shape), key
        assert torch.equal(tensor, back[key]), key


@pytest.mark.parametrize("name", IMPORTED)
def test_quark_imports_both_as_the_same_model(converted: Converted, tmp_path: Path, name: str) -> None:
    folders = []
    for kind, folder in (("source", converted.source(name)), ("back", converted.back(name))):
        copy = tmp_path / kind
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        folders.append(with_zero_points(copy))
    first, second = map(imported, folders)
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert any(tensor.dtype == torch.int8 and ".experts." in key for key, tensor in states[0].items())
    for key, tensor in states[0].items():
        other = states[1][key]
        if key.endswith(("scale", "zero_point")) and tensor.numel() == 1:
            tensor, other = tensor.expand(other.shape), other  # a scale for a whole weight is repeated over its rows
        assert torch.equal(tensor, other), key
    tokens = torch.randint(0, first.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, reference = second(tokens).logits, first(tokens).logits
    assert torch.isfinite(found).all()
    assert torch.equal(found, reference)


@pytest.mark.parametrize("name", EAGER)
def test_quark_imports_its_exports_with_zero_points(converted: Converted, name: str) -> None:
    assert imported(converted.source(name)).state_dict()


@pytest.mark.parametrize("form", ["source", "back"])
def test_quark_refuses_checkpoints_without_zero_points(converted: Converted, form: str) -> None:
    """Its own exports, too. Should a release import them, docs/engines.md has a sentence to change."""
    folder = getattr(converted, form)("qwen3_moe-quark0.13-f2f")
    with pytest.raises(ValueError, match=r"misses the keys .*weight_quantizer\.zero_point"):
        imported(folder)


@pytest.mark.parametrize("name", sorted({*FILE_TO_FILE, *IMPORTED}))
def test_quark_reads_the_config_as_it_reads_the_source_s(converted: Converted, name: str) -> None:
    """By Quark's own parser: the same modules are quantized, in int8, with the same kind of activation scales."""
    configs = [_quantization(folder) for folder in (converted.source(name), converted.back(name))]
    source, back = (QConfig.from_dict(config) for config in configs)
    tensors = load(converted.source(name))
    seen = set()
    for key, tensor in tensors.items():
        if not key.endswith(".weight") or tensor.ndim != 2 or "embed" in key:
            continue
        module = key.removesuffix(".weight")
        if kept_in_float(key):
            continue
        ours = get_layer_quant_config(back, torch.nn.Linear, module)
        assert (ours is not None and ours.weight is not None) == (tensor.dtype == torch.int8), module
        if tensor.dtype == torch.int8:
            theirs = get_layer_quant_config(source, torch.nn.Linear, module)
            assert ours.input_tensors.is_dynamic == theirs.input_tensors.is_dynamic
            assert ours.input_tensors.qscheme == theirs.input_tensors.qscheme
            assert ours.weight.dtype == theirs.weight.dtype
            seen.add(module)
    assert seen


def _quantization(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    value: dict[str, Any] = config.get("quantization_config") or config["text_config"]["quantization_config"]
    return value
