"""Linears other than routers that the engines' classes keep in float, exported in int8.

Scripts that quantize every linear write them so, such as those behind checkpoints named Channel-INT8. Sources are in
vLLM 0.33 (``quant_config=None``, ``nn.Linear``, or no parameter for it) and SGLang 0.5.23.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load
from support.exports import DATA, FIXTURES, restore

import quarkconv
from quarkconv.scheme.options import Quantize

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
    settings: Mapping[str, object] = {},
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
    config = json.loads((folder / "config.json").read_text()) | dict(settings)
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


class InSGLang(NamedTuple):
    """Int8 linears of attention in an export.

    Attributes:
        export: the export.
        modules: the linears; the first is the one in question.
        in_float: whether SGLang 0.5.23 alone keeps it in float.
        settings: of config.json, to replace.
        without: a module that is left out.
    """

    export: str
    modules: tuple[str, ...]
    in_float: bool
    settings: Mapping[str, object] = {}
    without: str | None = None


def in_bailing(leaves: Iterable[str], without: str | None, *, in_float: bool) -> InSGLang:
    modules = tuple(f"{ATTENTION}.{leaf}" for leaf in leaves)
    return InSGLang("bailing_hybrid-0.13-f2f", modules, in_float, BAILING_V3, without)


LATER_GATE = "model.layers.1.self_attn.g_proj"
IN_SGLANG = {
    # step3p5.py, Step3p5Attention
    "step3p5": InSGLang("step3p5-like-3key_fused", ("model.layers.0.self_attn.g_proj",), True),
    # bailing_moe_v3.py, DsV3MLA; in its KimiDeltaAttention, g_proj is a part of fused_qkvbfg_proj, in int8
    "gate of softmax attention": in_bailing(("g_proj", "kv_b_proj"), f"{ATTENTION}.b_proj", in_float=True),
    "gate of linear attention": in_bailing(("g_proj",), f"{ATTENTION}.b_proj", in_float=False),
    # kimi_linear.py, KimiDeltaAttention with no_kda_lora, which has f_proj; without, b_proj is in int8
    "beta": in_bailing(("b_proj", "f_proj"), None, in_float=True),
    "beta without f_proj": in_bailing(("b_proj",), f"{ATTENTION}.f_proj", in_float=False),
}


def with_sglangs(folder: Path, case: str, *, int8: bool) -> Path:
    """The export of a case, with its linears in int8 or BF16."""
    export, modules, _, settings, without = IN_SGLANG[case]
    return with_linears(folder, export, modules, int8=int8, settings=settings, without=without)


def sglang_verdicts(inspection: quarkconv.Inspection) -> set[tuple[str, str]]:
    """(form, verdict) of the rows for NVIDIA GPUs."""
    return {(row.form, row.verdict) for row in inspection.engines if row.engine == "sglang" and not row.devices}


def check_sglang_alone(before: quarkconv.Inspection, after: quarkconv.Inspection, *, in_float: bool) -> None:
    """Compare rows without, and with, int8 linears that SGLang keeps in float, or does not."""
    forms = ("compressed-tensors", "w8a8-int8")
    others = {item for item in sglang_verdicts(before) if item[0] not in forms}
    assert sglang_verdicts(before) == others | {(form, "int8") for form in forms}
    verdict = "wrong" if in_float else "int8"
    assert sglang_verdicts(after) == others | {("compressed-tensors", verdict), ("w8a8-int8", "int8")}
    assert "float-module-quantized" not in {item.code for item in after.findings}
    in_vllm = [[row for row in each.engines if row.engine == "vllm"] for each in (before, after)]
    assert in_vllm[0] == in_vllm[1] != []
    [advice] = [item for item in after.advice if item.text.startswith("SGLang")]
    assert advice.text.startswith("SGLang 0.5.23 runs it in int8 after convert --to w8a8-int8") or not in_float
    dequantized = [item.code for item in after.targets["w8a8-int8"].losses].count("module-dequantized")
    assert dequantized == in_float
    assert not [item for item in after.targets["compressed-tensors"].losses if item.code == "module-dequantized"]


@pytest.mark.parametrize("case", IN_SGLANG)
def test_linears_that_only_sglang_keeps_in_float_are_wrong_there_and_no_finding(case: str, tmp_path: Path) -> None:
    before, after = (
        quarkconv.inspect_checkpoint(with_sglangs(tmp_path / str(int8), case, int8=int8)) for int8 in (False, True)
    )
    check_sglang_alone(before, after, in_float=IN_SGLANG[case].in_float)


@pytest.mark.parametrize("case", IN_SGLANG)
@pytest.mark.parametrize("to", ["w8a8-int8", "compressed-tensors", "quark"])
def test_conversion_for_sglang_alone_dequantizes_what_it_alone_keeps_in_float(
    case: str, to: str, tmp_path: Path
) -> None:
    source = with_sglangs(tmp_path / "source", case, int8=True)
    result = quarkconv.convert_checkpoint(source, to, tmp_path / "out")
    first, *others = IN_SGLANG[case].modules
    in_float = IN_SGLANG[case].in_float and to == "w8a8-int8"
    stored, written = load(source), load(result.output)
    exact = stored[f"{first}.weight"].double() * stored[f"{first}.weight_scale"].double()[:, None]
    expected = exact.float().bfloat16() if in_float else stored[f"{first}.weight"]
    assert torch.equal(written[f"{first}.weight"], expected)
    assert (f"{first}.weight_scale" in written) != in_float
    assert all(torch.equal(written[f"{name}.weight"], stored[f"{name}.weight"]) for name in others)
    found = [item for item in result.to_json()["findings"] if item["code"] == "module-dequantized"]
    assert [item["subject"] for item in found] == [first] * in_float
    assert quarkconv.verify_checkpoint(result.output, source, device="cpu", tokens=2).ok
    verdicts = dict(sglang_verdicts(quarkconv.inspect_checkpoint(result.output)))
    assert verdicts["w8a8-int8"] == "int8"
    assert verdicts["compressed-tensors"] == ("wrong" if IN_SGLANG[case].in_float and not in_float else "int8")


def test_codes_in_sglangs_own_form_are_wrong_until_it_is_converted_again(tmp_path: Path) -> None:
    source = with_sglangs(tmp_path / "source", "step3p5", int8=True)
    earlier = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "earlier").output
    config = json.loads((earlier / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"] = {"quant_method": "w8a8_int8", "ignore": ignored}
    (earlier / "config.json").write_text(json.dumps(config))
    assert ("w8a8-int8", "wrong") in sglang_verdicts(quarkconv.inspect_checkpoint(earlier))
    again = quarkconv.convert_checkpoint(earlier, "w8a8-int8", tmp_path / "again").output
    assert ("w8a8-int8", "int8") in sglang_verdicts(quarkconv.inspect_checkpoint(again))


@pytest.mark.parametrize("quantize", ["missing", "all"])
@pytest.mark.parametrize("to", ["w8a8-int8", "compressed-tensors"])
def test_linears_that_only_sglang_keeps_in_float_stay_so_when_they_would_be_quantized(
    quantize: Quantize, to: str, tmp_path: Path
) -> None:
    """Declared int8 and stored in float, as ``missing`` quantizes them."""
    [gate] = IN_SGLANG["step3p5"].modules
    source = with_linears(tmp_path / "source", "step3p5-like-3key_fused", (gate, LATER_GATE), int8=False)
    path = source / "config.json"
    config = json.loads(path.read_text())
    shared = {f"model.layers.1.share_expert.{name}_proj" for name in ("gate", "up")}
    exclude = config["quantization_config"]["exclude"]
    exclude[:] = [name for name in exclude if name not in {gate, *shared}]
    if quantize == "all":
        del config["quantization_config"]
        tensors = {name: tensor.bfloat16() for name, tensor in load(source).items() if not name.endswith("_scale")}
        save_file(tensors, source / "model.safetensors")
    path.write_text(json.dumps(config))
    result = quarkconv.convert_checkpoint(source, to, tmp_path / "out", quantize=quantize)
    written, dtype = load(result.output), torch.bfloat16 if to == "w8a8-int8" else torch.int8
    assert {written[f"{name}.weight"].dtype for name in shared} == {torch.int8}
    assert written[f"{gate}.weight"].dtype == dtype
    assert written[f"{LATER_GATE}.weight"].dtype == (torch.bfloat16 if quantize == "missing" else dtype)
    assert quarkconv.verify_checkpoint(result.output, source, device="cpu", tokens=2).ok


def test_in_a_model_of_unknown_routing_sglangs_class_keeps_the_same_linears_in_float(tmp_path: Path) -> None:
    source = with_sglangs(tmp_path / "source", "step3p5", int8=True)
    path = source / "config.json"
    config = json.loads(path.read_text())
    del config["use_moe_router_bias"]
    path.write_text(json.dumps(config))
    assert ("compressed-tensors", "wrong") in sglang_verdicts(quarkconv.inspect_checkpoint(source))
    [gate] = IN_SGLANG["step3p5"].modules
    written = load(quarkconv.convert_checkpoint(source, "w8a8-int8", tmp_path / "out").output)
    assert written[f"{gate}.weight"].dtype == torch.bfloat16


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
