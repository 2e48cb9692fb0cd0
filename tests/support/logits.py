"""Logits of a checkpoint: of its layers one by one, and of transformers' own forward."""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quarkconv.description.description import describe
from quarkconv.evaluate.forward import embed, final_logits, run_layer
from quarkconv.evaluate.parameters import empty, fill
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.weights import CheckpointWeights


def streamed(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V], one layer in memory at a time."""
    skeleton = Skeleton(folder, torch.device("cpu"))
    with ExitStack() as stack:
        weights = stack.enter_context(CheckpointWeights(describe(folder), skeleton))
        fill(skeleton, weights.layer(None).on(skeleton.device).floats, None)
        states, calls = embed(skeleton, ids)
        handed_on = None
        for number, call in enumerate(calls):
            fill(skeleton, weights.layer(number).on(skeleton.device).floats, skeleton.layer_prefix(number))
            states, handed_on = run_layer(skeleton, number, states, call, handed_on)
            empty(skeleton, number)
            assert all(parameter.is_meta for parameter in skeleton.layers[number].parameters())
        return final_logits(skeleton, ids, states, torch.arange(ids.shape[1]))


def whole(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model as transformers loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        config = AutoConfig.from_pretrained(folder)
        text = type(config) in AutoModelForCausalLM._model_mapping
        auto: Any = AutoModelForCausalLM if text else AutoModelForImageTextToText
        model, about = auto.from_pretrained(folder, output_loading_info=True)
        fill_experts(model, about["missing_keys"], folder)
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def fill_experts(model: torch.nn.Module, missing: set[str], folder: Path) -> None:
    """Fill experts of which transformers' loader does not know the names: Quark's own, after it replaced modules."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in missing:
        parameter = model.get_parameter(name)
        if name in tensors:
            parameter.copy_(tensors[name])
            continue
        if flat := re.fullmatch(r"(.*\.experts\.mlp)\.(w1|v1|w2)", name):  # DbrxExperts: one expert below the other
            found_here = [tensors[key] for key in by_expert(tensors, *flat.groups())]
            parameter.copy_(torch.cat([item.T for item in found_here] if flat[2] == "w2" else found_here))
            continue
        found = re.fullmatch(r".*?(layers\..*\.experts)\.(\w+?)(_bias)?", name)
        assert found, name
        prefix, leaf, bias = found[1].replace("block_sparse_moe", "mlp"), found[2], found[3]
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        kind = "bias" if bias else "weight"
        for expert in range(parameter.shape[0]):
            by_end = {key[key.find("layers.") :].replace("block_sparse_moe", "mlp"): tensors[key] for key in tensors}
            names = [f"{prefix}.{expert}.{part}.{kind}" for part in parts]
            joined = by_end.get(f"{prefix}.{expert}.{leaf}.{kind}")
            value = joined if joined is not None else torch.cat([by_end[key] for key in names])
            parameter[expert] = value.T if transposed(model, name) else value


def by_expert(tensors: dict[str, torch.Tensor], prefix: str, leaf: str) -> list[str]:
    """Names of one projection of each expert, in order."""
    count = sum(key.startswith(f"{prefix}.") and key.endswith(f".{leaf}.weight") for key in tensors)
    return [f"{prefix}.{expert}.{leaf}.weight" for expert in range(count)]


def transposed(model: torch.nn.Module, name: str) -> bool:
    """Whether transformers keeps these experts as [inputs, outputs]."""
    return bool(model.get_submodule(name.rpartition(".")[0]).is_transposed) and not name.endswith("_bias")
