"""The float path: logits of the streamed model equal transformers' own forward of the target ``bf16``, bit for bit.

Both run the same classes on the same weights; only loading differs, and when each layer runs.
"""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exports import DATA, EXPORTS, FIXTURES, restore

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint
from quarkconv.description.description import describe
from quarkconv.errors import QuarkconvError
from quarkconv.evaluate.forward import embed, final_logits, run_layer
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.weights import CheckpointWeights

pytestmark = pytest.mark.long(15)

FAMILIES = {path.name: path for path in sorted((DATA / "families").iterdir()) if path.is_dir()}
OTHER_TOOLS = {path.name: path for path in sorted((DATA / "other_tools").iterdir()) if path.is_dir()}
KEPT = {**FAMILIES, **EXPORTS, **FIXTURES, **OTHER_TOOLS}

REFUSED = {
    # The class fails as a whole too: head_dim of this config is not that of its rotary embedding.
    "deepseek_v3-0.13-eager": "cannot be run layer by layer",
    "deepseek_v3-0.13-f2f": "cannot be run layer by layer",
    "qwen3_moe-0.13-f2f-wrapped": "no class",
    "step3p5-like-3key_fused": "no class",
}
"""What ``evaluate`` refuses, and in which words."""


def streamed(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V], one layer in memory at a time."""
    skeleton = Skeleton(folder, torch.device("cpu"))
    with ExitStack() as stack:
        weights = stack.enter_context(CheckpointWeights(describe(folder), skeleton))
        skeleton.fill(weights.layer(None).on(skeleton.device).floats, None)
        states, calls = embed(skeleton, ids)
        handed_on = None
        for number, call in enumerate(calls):
            skeleton.fill(weights.layer(number).on(skeleton.device).floats, skeleton.layer_prefix(number))
            states, handed_on = run_layer(skeleton, number, states, call, handed_on)
            skeleton.empty(number)
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


@pytest.mark.parametrize("name", KEPT)
def test_the_dequantized_model_equals_transformers_own_forward_of_the_bf16_target(name: str, tmp_path: Path) -> None:
    source = restore(KEPT[name], tmp_path / "source")
    if not inspect_checkpoint(source).targets["bf16"].supported:
        with pytest.raises(QuarkconvError):
            convert_checkpoint(source, "bf16", tmp_path / "bf16")
        return
    out = convert_checkpoint(source, "bf16", tmp_path / "bf16").output
    ids = torch.randint(0, 24, (2, 20), generator=torch.Generator().manual_seed(1))
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            streamed(source, ids)
        return
    assert torch.equal(streamed(source, ids), whole(out, ids))


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "bf16"])
def test_every_layout_of_a_model_gives_the_same_logits(quantized: Path, target: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (1, 12), generator=torch.Generator().manual_seed(2))
    out = convert_checkpoint(quantized, target, tmp_path / target).output
    assert torch.equal(streamed(out, ids), streamed(quantized, ids))


def test_the_unquantized_model_equals_transformers_own_forward(unquantized: Path) -> None:
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(streamed(unquantized, ids), whole(unquantized, ids))
