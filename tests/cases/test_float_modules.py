"""Linears other than routers that the engines' classes keep in float, exported in int8.

Scripts that quantize every linear write them so, such as those behind checkpoints named Channel-INT8. Sources are in
vLLM 0.33 (``quant_config=None``, ``nn.Linear``, or no parameter for it) and SGLang 0.5.23.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load
from support.exports import DATA, FIXTURES, restore

import quarkconv

FAMILIES = DATA / "families"
INDEXER = tuple(f"model.layers.0.self_attn.indexer.{name}" for name in ("weights_proj", "wk"))
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    # deepseek_v2.py, Indexer.wk_weights_proj; SGLang's dsa_indexer.py keeps weights_proj
    "deepseek_v32": ("deepseek_v32-0.13-f2f", INDEXER),
    "glm_moe_dsa": ("glm_moe_dsa-0.13-f2f", INDEXER),
    # glm5next/common/attention.py, wk_weights_proj
    "glm5_next": ("glm5_next-0.13-f2f", tuple(name.replace("model.", "model.language_model.", 1) for name in INDEXER)),
    # deepseek_v4/compressor.py, fused_wkv_wgate; attention.py, weights_proj
    "deepseek_v4": (
        "deepseek_v4-0.13-f2f",
        tuple(f"model.layers.0.attn.{name}" for name in ("compressor.wgate", "compressor.wkv")),
    ),
    "deepseek_v4 in the names of transformers": (
        "deepseek_v4-0.13-eager",
        tuple(f"model.layers.0.self_attn.compressor.{name}" for name in ("gate_proj", "kv_proj")),
    ),
    # qwen4_exp/common/hyperconnection.py
    "qwen4_exp": (
        "qwen4_exp-0.13-f2f",
        (
            *(f"model.layers.0.attn_hyper_connection.{name}" for name in (
                "block_inject_weight", "input_mix_weight_down", "input_mix_weight_up"
            )),
            "model.hyper_connection_mixer.input_mix_weight_down",
        ),
    ),
    # kimi_k3/nvidia/model.py
    "kimi_linear": (
        "kimi_linear-0.13-f2f",
        (
            "model.layers.0.mlp_res_proj", "model.layers.0.self_attention_res_proj", "model.output_attn_res_proj",
        ),
    ),
    # mamba_mixer.py, MambaMixer
    "jamba": (
        "jamba-0.13-f2f",
        tuple(f"model.layers.0.mamba.{name}_proj" for name in ("dt", "in", "out", "x")),
    ),
}  # fmt: skip


def with_linears(
    folder: Path,
    export: str,
    modules: tuple[str, ...],
    *,
    int8: bool,
    settings: dict[str, object] | None = None,
    without: str | None = None,
) -> Path:
    """An export with more linears [8, 16], in int8 or BF16, replaced or added; those in int8 are not excluded.

    Args:
        folder: where it is written.
        export: the export.
        modules: the linears.
        int8: whether they are in int8.
        settings: of config.json, to replace.
        without: a module that is left out.
    """
    generator = torch.Generator().manual_seed(0)
    restore(FIXTURES.get(export, FAMILIES / export), folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != without}
    for module in modules:
        shape = tensors[f"{module}.weight"].shape if f"{module}.weight" in tensors else (8, 16)
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand(shape[0], generator=generator) * 0.01 + 1e-3
        tensors[f"{module}.weight"] = codes if int8 else (codes * scale[:, None]).bfloat16()
        tensors.pop(f"{module}.weight_scale", None)
        if int8:
            tensors[f"{module}.weight_scale"] = scale
    config = json.loads((folder / "config.json").read_text()) | (settings or {})
    exclude = config["quantization_config"]["exclude"]
    exclude[:] = [name for name in exclude if name not in modules] + ([] if int8 else list(modules))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_linears_that_engines_keep_in_float_are_an_error_in_int8(case: str, tmp_path: Path) -> None:
    export, modules = CASES[case]
    before = quarkconv.inspect_checkpoint(FAMILIES / export)
    inspection = quarkconv.inspect_checkpoint(with_linears(tmp_path / "source", export, modules, int8=True))
    found, already = (
        {item.code: (item.severity.value, item.count) for item in each.findings} for each in (inspection, before)
    )
    of_others = already.get("float-module-quantized", ("error", 0))[1]  # the router of deepseek_v4 from memory
    assert found["float-module-quantized"] == ("error", len(modules) + of_others)
    assert not [fact for fact in inspection.engines if fact.form == "quark" and fact.verdict == "int8"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["compressed-tensors", "w8a8-int8", "ascend", "quark"])
def test_conversion_dequantizes_linears_that_engines_keep_in_float(case: str, to: str, tmp_path: Path) -> None:
    export, modules = CASES[case]
    source = with_linears(tmp_path / "source", export, modules, int8=True)
    result = quarkconv.convert_checkpoint(source, to, tmp_path / "out")
    stored, written = load(source), load(result.output)
    for module in modules:
        exact = stored[f"{module}.weight"].double() * stored[f"{module}.weight_scale"].double()[:, None]
        assert torch.equal(written[f"{module}.weight"], exact.float().bfloat16())
        assert f"{module}.weight_scale" not in written
    assert "module-dequantized" in {item["code"] for item in result.to_json()["findings"]}
    assert quarkconv.verify_checkpoint(result.output, source, device="cpu", tokens=2).ok
    assert "float-module-quantized" not in {item.code for item in quarkconv.inspect_checkpoint(result.output).findings}


@pytest.mark.parametrize("case", CASES)
def test_linears_that_engines_keep_in_float_stay_so_when_everything_is_quantized(case: str, tmp_path: Path) -> None:
    export, modules = CASES[case]
    source = with_linears(tmp_path / "source", export, ("model.layers.0.other", *modules), int8=False)
    out = quarkconv.convert_checkpoint(source, "w8a8-int8", tmp_path / "out", quantize="all").output
    written = load(out)
    assert written["model.layers.0.other.weight"].dtype == torch.int8
    assert {written[f"{module}.weight"].dtype for module in modules} == {torch.bfloat16}


def test_linears_of_other_families_with_the_same_names_are_quantized(tmp_path: Path) -> None:
    """vLLM's MambaMixer2 takes a quantization method (granitemoehybrid), its MambaMixer none (jamba)."""
    module = "model.layers.0.mamba.in_proj"
    source = with_linears(tmp_path / "source", "granitemoehybrid-0.13-eager", (module,), int8=False)
    out = quarkconv.convert_checkpoint(source, "w8a8-int8", tmp_path / "out", quantize="all").output
    assert load(out)[f"{module}.weight"].dtype == torch.int8


BAILING_V3: dict[str, object] = {
    "architectures": ["BailingMoeV3ForCausalLM"], "n_group": 2, "num_expert_group": None, "num_experts_per_tok": 2,
}  # fmt: skip
"""Settings that make a model of bailing_hybrid one of its third generation."""
ATTENTION = "model.layers.0.attention"
IN_SGLANG: dict[str, tuple[tuple[str, ...], str | None, bool]] = {
    # bailing_moe_v3.py, DsV3MLA; in its KimiDeltaAttention, g_proj is a part of fused_qkvbfg_proj, in int8
    "gate of softmax attention": (("g_proj", "kv_b_proj"), f"{ATTENTION}.b_proj", True),
    "gate of linear attention": (("g_proj",), f"{ATTENTION}.b_proj", False),
    # kimi_linear.py, KimiDeltaAttention with no_kda_lora, which has f_proj; without, b_proj is in int8
    "beta": (("b_proj", "f_proj"), None, True),
    "beta without f_proj": (("b_proj",), f"{ATTENTION}.f_proj", False),
}
"""Case -> int8 linears of attention, one that is left out, and whether SGLang 0.5.23 alone keeps one in float."""


def sglang_verdicts(inspection: quarkconv.Inspection) -> set[tuple[str, str]]:
    """(form, verdict) of the rows for NVIDIA GPUs."""
    return {(row.form, row.verdict) for row in inspection.engines if row.engine == "sglang" and not row.devices}


def check_sglang_alone(before: quarkconv.Inspection, after: quarkconv.Inspection, *, in_float: bool) -> None:
    """Compare rows without, and with, int8 linears that SGLang keeps in float, or does not."""
    forms = ("compressed-tensors", "w8a8-int8")
    others = {item for item in sglang_verdicts(before) if item[0] not in forms}
    assert sglang_verdicts(before) == others | {(form, "int8") for form in forms}
    assert sglang_verdicts(after) == others | {(form, "wrong" if in_float else "int8") for form in forms}
    assert "float-module-quantized" not in {item.code for item in after.findings}
    in_vllm = [[row for row in each.engines if row.engine == "vllm"] for each in (before, after)]
    assert in_vllm[0] == in_vllm[1] != []
    assert any("SGLang 0.5.23 computes wrong results" in item.text for item in after.advice) == in_float


@pytest.mark.parametrize("case", IN_SGLANG)
def test_linears_that_only_sglang_keeps_in_float_are_wrong_there_and_no_finding(case: str, tmp_path: Path) -> None:
    leaves, without, in_float = IN_SGLANG[case]
    modules = tuple(f"{ATTENTION}.{leaf}" for leaf in leaves)
    before, after = (
        quarkconv.inspect_checkpoint(
            with_linears(
                tmp_path / str(int8), "bailing_hybrid-0.13-f2f", modules,
                int8=int8, settings=BAILING_V3, without=without,
            )
        )
        for int8 in (False, True)
    )  # fmt: skip
    check_sglang_alone(before, after, in_float=in_float)


def test_the_gate_of_step3p5_in_int8_is_wrong_in_sglang_alone(tmp_path: Path) -> None:
    """SGLang 0.5.23, step3p5.py, Step3p5Attention."""
    modules = ("model.layers.0.self_attn.g_proj",)
    before, after = (
        quarkconv.inspect_checkpoint(with_linears(tmp_path / str(int8), "step3p5-like-3key_fused", modules, int8=int8))
        for int8 in (False, True)
    )
    check_sglang_alone(before, after, in_float=True)


def test_linears_of_prediction_layers_that_only_vllm_keeps_in_float_change_the_note(tmp_path: Path) -> None:
    """vLLM 0.33, mimo_v2.py, MiMoV2Attention: drafts are wrong, the model itself is not."""
    module = "model.mtp.layers.0.self_attn.o_proj"
    notes = []
    for int8 in (False, True):
        source = with_linears(tmp_path / str(int8), "mimo_v2_flash-0.13-f2f", (module,), int8=int8)
        rows = [row for row in quarkconv.inspect_checkpoint(source).engines if row.engine == "vllm" and not row.devices]
        notes.append({row.form: row.note for row in rows if row.verdict == "int8"})
    assert notes[0] == {"quark": "", "compressed-tensors": ""}
    assert list(notes[1]) == list(notes[0])
    assert all(note.startswith("MTP drafts are wrong") for note in notes[1].values())
