"""Every family that transformers builds runs in INT8, and what is not INT8 W8A8 is refused or named."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.exports import DATA, restore
from support.int8_error import largest_error
from support.model import Model
from support.quark_config import layer_config

from quarkconv import SourceError, UnsupportedError, evaluate_checkpoint
from quarkconv.cli.render.evaluation import render_evaluation
from quarkconv.evaluate.results import Evaluation

pytestmark = pytest.mark.long(10)

FAMILIES = {path.name: path for path in sorted((DATA / "families").iterdir()) if path.is_dir()}
NOT_EVALUATED = {
    # tests/evaluate/test_float_path.py says why.
    "deepseek_v3-0.13-eager", "deepseek_v3-0.13-f2f",
    # Experts of two sizes.
    "ernie4_5_vl_moe-0.13-f2f",
}  # fmt: skip
FLOAT_EXPERTS = {"dbrx-0.13-f2f", "gpt_oss-0.13-f2f", "qwen3_vl_moe-0.13-f2f", "llama4-0.13-f2f"}
"""Quark leaves experts of three dimensions in float, and those of a layer in one matrix."""
FLOAT_LINEARS = {"deepseek_v4-0.13-eager": ("lm_head",)}
"""Int8 linears that run in float: Quark quantized this head, whose name its config excludes under another one."""
UNKNOWN_ROUTING = {"llama4-0.13-f2f"}
"""Experts that compute every token, with weights of zero: which ones a token chooses is not seen."""

IN_A_ROW = {
    # gate and up; down
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm5_next",
         "glm_moe_dsa", "minimax_m2", "minimax_m3_vl", "nemotron_h", "qwen3_5_moe", "qwen4_exp"), 2
    ),
    "qwen3_next": 3,  # o of attention before them
    # Linear attention: q, k (twice, in the delta rule), v, beta, two gates of two linears each, o. Those of
    # bailing_hybrid have one each, but the error of the decay adds up over the tokens.
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), 12),
}  # fmt: skip
"""Family -> INT8 products in a row in a layer; in the others four: v and o of attention, gate and up, down."""


ANOTHER_WEIGHT = {"phimoe": 2 / 48}
"""Family -> share of tokens whose experts get another weight as their router's input moves.

Sparsemixer's softmax is over the logits within 2 % of the best: one that crosses that line changes a weight by half.
Noise of 0.9 % lets 0.6 to 0.8 of 48 tokens cross it; eight seeds gave errors of 1.1 to 4.7 %, as one or two of 48 do.
"""


def own_bound(family: str, changed: float) -> float:
    """The largest error of a layer on the baseline's hidden states.

    Args:
        family: the model type.
        changed: share of tokens that choose another expert.
    """
    return largest_error(IN_A_ROW.get(family, 4), changed + ANOTHER_WEIGHT.get(family, 0.0))


@pytest.fixture(scope="module")
def few_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three windows of 16 tokens of the smallest vocabulary."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 24, (3, 16), generator=torch.Generator().manual_seed(3))}, path)
    return path


def evaluated(model: Path, ids: Path) -> Evaluation:
    return evaluate_checkpoint(model, token_ids=ids, batch=2, device="cpu", resume=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_stays_near_the_dequantized_model_in_every_family(name: str, few_ids: Path, tmp_path: Path) -> None:
    source = restore(FAMILIES[name], tmp_path / "source")
    if name in NOT_EVALUATED:
        with pytest.raises(UnsupportedError):
            evaluated(source, few_ids)
        return
    found = evaluated(source, few_ids)
    assert found.int8 is not None
    assert 0 < found.int8.mean < 0.001
    family = name.partition("-")[0]
    assert all(0 < layer.own < own_bound(family, layer.routing_changed or 0) for layer in found.layers)
    assert (len(found.float_experts) > 0) == (name in FLOAT_EXPERTS)
    assert (len(found.experts) > 0) == (name not in FLOAT_EXPERTS)
    assert found.float_linears == FLOAT_LINEARS.get(name, ())
    tokens = [sum(layer.load) for layer in found.layers if layer.load]
    assert (len(tokens) > 0) == (name not in UNKNOWN_ROUTING)
    assert all(count == 3 * 16 * 2 for count in tokens)  # each token chooses two experts


@pytest.mark.parametrize("name", ["deepseek_v3-0.13-eager", "deepseek_v3-0.13-f2f"])
def test_deepseek_v3_runs_with_the_config_that_it_is_published_with(name: str, few_ids: Path, tmp_path: Path) -> None:
    """It has no ``head_dim``; the test export has one of another size than its rotary embedding."""
    source = restore(FAMILIES[name], tmp_path / "source")
    config = json.loads((source / "config.json").read_text("utf-8"))
    assert config.pop("head_dim") != config["qk_rope_head_dim"]
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    found = evaluated(source, few_ids)
    assert found.int8 is not None
    assert 0 < found.int8.mean < 0.001
    assert all(0 < layer.own < own_bound("deepseek_v3", 0) for layer in found.layers)


def test_kimi_k2_has_the_figures_of_deepseek_v3(few_ids: Path, tmp_path: Path) -> None:
    """Its configs name the class of deepseek_v3 and code of their own, which does not run."""
    source = restore(FAMILIES["deepseek_v3-0.13-f2f"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text("utf-8"))
    del config["head_dim"]
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    expected = evaluated(source, few_ids)
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.Model"}
    config |= {"model_type": "kimi_k2", "auto_map": code}
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    assert evaluated(source, few_ids).to_json() == expected.to_json()


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("mixtral-quark0.13-eager-experts_left_bf16", [0, 1, 2]),
        ("qwen3_5_moe-0.13-f2f-experts_left_3d", [0, 1]),
        ("qwen3_moe-0.13-f2f-layer_excluded", [1]),
        ("qwen3_moe-0.13-f2f-some_experts_excluded", [1, 2]),
    ],
)
def test_experts_that_are_partly_float_run_in_float_and_are_named(
    name: str, experts: list[int], checkpoints: Callable[[str], Path], few_ids: Path
) -> None:
    found = evaluated(checkpoints(name), few_ids)
    numbers = [int(path.split("layers.")[1].split(".")[0]) for path in found.float_experts]
    assert numbers == experts
    console = Console(width=100, file=io.StringIO())
    with console.capture() as shown:
        console.print(render_evaluation(found))
    assert "stored in float, evaluated in float" in shown.get()


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("qwen3_moe-0.13-f2f-ptpc_fp8", UnsupportedError, "scheme-unsupported"),
        ("qwen3_moe-0.13-f2f-mxfp4_experts", UnsupportedError, "scheme-unsupported"),
        ("qwen3_moe-0.13-f2f-int4_fp8", UnsupportedError, "scheme-unsupported"),
        ("qwen3_moe-0.13-f2f-int8_weight_only", UnsupportedError, "scheme-unsupported"),
        ("qwen3_moe-0.11-eager-asymmetric", UnsupportedError, "scheme-unsupported"),
        ("qwen3_moe-0.13-f2f-int8_static_without_input_scale", SourceError, "scale-missing"),
    ],
)
def test_what_is_not_int8_w8a8_is_refused(
    name: str, error: type[Exception], words: str, checkpoints: Callable[[str], Path], few_ids: Path
) -> None:
    with pytest.raises(error, match=words):
        evaluated(checkpoints(name), few_ids)


def test_attention_in_fp8_beside_int8_experts_is_refused(few_ids: Path, tmp_path: Path) -> None:
    model = Model()
    for name in "qkvo":
        codes = torch.ones(8, 8).to(torch.float8_e4m3fn)
        model.set(f"model.layers.0.self_attn.{name}_proj.weight", codes)
        model.set(f"model.layers.0.self_attn.{name}_proj.weight_scale", torch.ones(8))
    layer = copy.deepcopy(layer_config())
    layer["weight"]["dtype"] = layer["input_tensors"]["dtype"] = "fp8_e4m3"
    model.quantization["layer_quant_config"] = {"*layers.0.self_attn*": layer}
    with pytest.raises(UnsupportedError, match="neither INT8 nor float") as caught:
        evaluated(model.write(tmp_path / "model"), few_ids)
    assert caught.value.found == "F8_E4M3"


@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.experts.2.up_proj"])
def test_zero_points_that_are_not_zero_are_refused(module: str, few_ids: Path, tmp_path: Path) -> None:
    source = restore(FAMILIES["qwen3_moe-0.13-eager"], tmp_path / "source")
    name = f"model.layers.0.{module}.weight_zero_point"
    (file,) = [file for file in source.glob("*.safetensors") if name in load_file(file)]
    tensors = load_file(file)
    tensors[name][0] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="zero point is not zero") as caught:
        evaluated(source, few_ids)
    assert caught.value.tensor == name
