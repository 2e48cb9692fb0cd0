"""transformers on what is converted: ``bf16`` is the dequantized model; what it refuses or takes wrongly is pinned.

The reference is put together here: codes times scales of the Quark export, stacked, in the names of transformers' own
classes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.expected import Stacked, fill
from engines.forms import Forms
from support.checkpoints import Tensors
from support.exports import Checkpoints
from transformers import AutoModelForCausalLM, PreTrainedModel

EXPORTS = (
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "qwen3_moe-quark0.11-eager-int8_static",
    "qwen3_moe-0.11-eager-kv_cache_fp8",
    "qwen3_moe-0.13-f2f-layer_excluded",
    "mixtral-quark0.11-eager",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "deepseek_v3-0.13-f2f-mtp",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen2_moe-0.11-eager-shared_expert",
    "qwen3_5_moe-0.13-f2f-language_model",
)

NAMES = (
    (r"^model\.language_model\.", "model."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.w13$", ".experts.gate_up_proj"),
    (r"\.experts\.w2$", ".experts.down_proj"),
)
"""Names that published checkpoints have -> those of the classes in transformers 5."""


@pytest.fixture(scope="module")
def forms(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(checkpoints, tmp_path_factory.mktemp("transformers"), fill)


def from_pretrained(folder: Path) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """The model of a checkpoint, and which names did not find one another."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    return model, {key: set(value) for key, value in info.items() if value}


def reference(source: Path, like: PreTrainedModel) -> PreTrainedModel:
    """The dequantized model: every tensor of the class, and nothing else, from the Quark export."""
    state: Tensors = {}
    for name, tensor in Stacked(source).dequantized.items():
        if name.endswith("_scale"):  # of activations, or of a key-value cache
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    weights = like.state_dict()
    assert {name for name in state.keys() - weights.keys() if not of_mtp(name, like) and "visual" not in name} == set()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(like.config, dtype=like.dtype)
    state = {name: state[name].to(value.dtype) for name, value in weights.items()}
    model.load_state_dict(state, strict=True, assign=True)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def of_mtp(name: str, model: PreTrainedModel) -> bool:
    """True for a tensor that predicts further tokens; transformers' classes leave these out."""
    layer = re.search(r"layers\.(\d+)\.", name)
    layers = model.config.get_text_config().num_hidden_layers
    return name.startswith("mtp.") or (layer is not None and int(layer[1]) >= layers)


@pytest.mark.parametrize("name", EXPORTS)
def test_bf16_is_the_dequantized_model(forms: Forms, name: str) -> None:
    model, loading_info = from_pretrained(forms(name, "bf16"))
    assert {name for name in loading_info.pop("unexpected_keys", set()) if not of_mtp(name, model)} == set()
    assert not loading_info
    expected = reference(forms.source(name), model)
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected_logits = model.eval()(tokens).logits, expected(tokens).logits
    assert torch.isfinite(found).all()
    assert found.std() > 0
    assert torch.equal(found, expected_logits)


REFUSED = {
    "compressed-tensors": (RuntimeError, "issues during automatic conversion of the weights"),
    "quark": (ImportError, "install the latest version of Quark"),
}
"""Target -> how transformers fails on it. Should one of these load, ``inspection/engines.toml`` has a row to change."""


@pytest.mark.parametrize("target", REFUSED)
@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager"])
def test_what_transformers_refuses(forms: Forms, name: str, target: str) -> None:
    error, message = REFUSED[target]
    with pytest.raises(error, match=message):
        from_pretrained(forms(name, target))


def test_why_compressed_tensors_is_refused(forms: Forms, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError):
        from_pretrained(forms("qwen3_moe-quark0.13-f2f", "compressed-tensors"))
    assert "torch.cat(): expected a non-empty list of Tensors" in caplog.text


MISSING = {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("name", "target", "unexpected", "missing"),
    [
        ("qwen3_moe-quark0.13-f2f", "fused-int8", {"gate_up_proj_scale", "down_proj_scale"}, set()),
        (
            "mixtral-quark0.11-eager",
            "fused-int8",
            {"w13", "w13_scale", "w2", "w2_scale"},
            {"gate_up_proj", "down_proj"},
        ),
        ("qwen3_moe-quark0.13-f2f", "w8a8-int8", {"weight_scale"}, set()),
        ("mixtral-quark0.11-eager", "w8a8-int8", {"weight_scale"}, set()),
    ],
)
def test_what_is_loaded_wrongly(forms: Forms, name: str, target: str, unexpected: set[str], missing: set[str]) -> None:
    """With a warning and without an error: scales have no place, and codes become weights, or experts are random."""
    model, loading_info = from_pretrained(forms(name, target))
    assert {key.rpartition(".")[2] for key in loading_info["unexpected_keys"]} == unexpected
    assert {key.rpartition(".")[2] for key in loading_info.get("missing_keys", set())} == missing
    if not missing:
        codes = Stacked(forms.source(name)).tensors[
            "model.layers.0." + ("mlp.experts.gate_up_proj" if "qwen" in name else "block_sparse_moe.experts.w13")
        ]
        assert torch.equal(model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"], codes.bfloat16())


def test_there_is_no_class_for_step3p5(forms: Forms) -> None:
    """Its bf16 is held by vLLM's class alone."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        from_pretrained(forms("step3p5-like-3key_fused", "bf16"))
