"""Experts that are not recognised: targets that write modules one by one convert them, the others refuse them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import xxhash
from support.checkpoints import Tensors
from support.exports import DATA
from support.model import Model
from support.reported import finding, load, refusal

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.cli.main import main
from quarkconv.description.description import describe
from quarkconv.findings import Severity
from quarkconv.scheme.options import Quantize
from quarkconv.targets import TARGETS

ONE_BY_ONE: Final = tuple(name for name in TARGETS if name != "fused-int8")
ERNIE_VL: Final = DATA / "families" / "ernie4_5_vl_moe-0.13-f2f"
"""As published: experts of text and of images, of two sizes, under one module."""


def renamed(pattern: str, leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Model:
    """A model whose experts have other names: `pattern` with the number of the expert, and other projections."""
    model = Model()
    of = dict(zip(("gate_proj", "up_proj", "down_proj"), leaves, strict=True))
    for shard in model.shards:
        for name in [name for name in shard if ".mlp.experts." in name]:
            head, _, tail = name.partition("mlp.experts.")
            number, leaf, tensor = tail.split(".")
            shard[f"{head}{pattern.format(number)}.{of[leaf]}.{tensor}"] = shard.pop(name)
    return model


def with_some_biases(model: Model) -> Model:
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("down_proj.weight") and ".experts." in name]:
            shard[name.replace(".weight", ".bias")] = torch.rand(len(shard[name])).bfloat16()
    return model


def stacked() -> Model:
    """All experts of a layer in one linear of three dimensions, whose name does not tell what it is."""
    model = Model()
    for layer, shard in enumerate(model.shards):
        head = f"model.layers.{layer}.mlp.experts"
        for leaf, name in (("gate_proj", "bank_in"), ("up_proj", "bank_up"), ("down_proj", "bank_out")):
            for end in ("weight", "weight_scale"):
                parts = [shard.pop(f"{head}.{expert}.{leaf}.{end}") for expert in range(3)]
                shard[f"model.layers.{layer}.mlp.{name}.{end}"] = torch.stack(parts)
    return model


UNREAD: Final[dict[str, Callable[[Path], Path]]] = {
    "another module": renamed("mlp.expert_list.{}").write,
    "another name of each expert": renamed("mlp.experts.expert_{}").write,
    "other projections": renamed("mlp.experts.{}", ("fc1_g", "fc1", "fc2")).write,
    "biases of some projections": with_some_biases(Model()).write,
    "all experts in one linear": stacked().write,
    "two sizes under one module": lambda _: ERNIE_VL,
}


def expected(tensors: Tensors, target: str) -> Tensors:
    """The tensors of an output, computed from those of the source by torch."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if scale is None:
            if not name.endswith("_scale"):
                found[name] = tensor
            continue
        rows = scale.float() if scale.ndim == tensor.ndim else scale.float().unsqueeze(-1)
        if target == "bf16":
            found[name] = (tensor.double() * rows.double()).float().bfloat16()
            continue
        found[name] = tensor
        found[f"{name}_scale"] = rows.squeeze(-1) if target == "quark" else rows
        if target == "ascend":
            found[f"{name}_offset"] = torch.zeros_like(rows)
    return found


@pytest.mark.parametrize("target", ONE_BY_ONE)
@pytest.mark.parametrize("variant", UNREAD)
def test_experts_that_are_not_recognised_are_converted_module_by_module(
    variant: str, target: str, tmp_path: Path
) -> None:
    source = UNREAD[variant](tmp_path / "source")
    assert inspect_checkpoint(source).targets[target].supported
    result = convert_checkpoint(source, target, tmp_path / "out")

    wanted, found = expected(load(source), target), load(result.output)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    warning = next(item for item in result.plan.losses if item.code == "experts-not-understood")
    unread = [
        name for name, form in describe(source).stored.linears.items() if form.quantized and name in warning.message
    ]
    assert (warning.severity, warning.subject) == (Severity.WARNING, unread[0])
    assert "unrecognised experts" in warning.message
    assert result.manifest.moe is None
    assert inspect_checkpoint(source).targets[target].nbytes == result.plan.tensor_bytes

    verified = verify_checkpoint(result.output, source, device="cpu")
    assert verified.problems == ()
    assert verified.verdict() == "Verified: structure and bytes; not checked: numbers"
    assert verified.bytes.against_source
    assert target == "bf16" or unread[0] in str(verified.numbers.skipped)


@pytest.mark.parametrize("variant", UNREAD)
def test_experts_that_are_not_recognised_are_not_stacked(variant: str, tmp_path: Path) -> None:
    source = UNREAD[variant](tmp_path / "source")
    found = finding(source, "experts-not-understood")
    assert (found.severity, "one by one" in found.hint) == (Severity.ERROR, True)
    assert refusal(source, "fused-int8").exit_code == 4
    with pytest.raises(UnsupportedError):
        verify_checkpoint(source, device="cpu")


def test_the_command_line_says_that_experts_were_not_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = renamed("mlp.expert_list.{}").write(tmp_path / "source")
    out = tmp_path / "out"

    def exit_code(*command: object) -> object:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([*map(str, command)])
        return exited.value.code

    assert exit_code("inspect", source) == 1
    assert "ascend: experts as they are, not recognised" in " ".join(capsys.readouterr().out.split())
    assert exit_code("convert", source, "--to", "fused-int8", "--out", out) == 4
    assert exit_code("convert", source, "--to", "ascend", "--out", out) == 0
    assert "18 modules of unrecognised experts" in " ".join(capsys.readouterr().out.split())
    assert exit_code("verify", out, "--source", source, "--json") == 0
    verified: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [item["code"] for item in verified["findings"]] == ["experts-not-understood"]
    assert "18 modules of experts were not recognised" in verified["numbers"]["skipped"]


def test_experts_that_are_not_recognised_beside_others_are_said_not_to_be_checked(tmp_path: Path) -> None:
    model = Model()
    model.second |= {name: t for name, t in with_some_biases(Model()).second.items() if name not in model.second}
    source = model.write(tmp_path / "source")
    assert refusal(source, "fused-int8").exit_code == 4
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    verified = verify_checkpoint(out, source, device="cpu")
    assert verified.ok
    assert [layer.module for layer in verified.numbers.layers] == ["model.layers.0.mlp.experts"]
    assert verified.verdict().endswith("not checked: numbers of experts that were not recognised")


def test_codes_without_a_module_are_not_converted(tmp_path: Path) -> None:
    """Without the name of a weight nothing says which scales belong to the codes."""
    model = Model()
    for layer, shard in enumerate(model.shards):
        model.remove(f"model.layers.{layer}.mlp.experts")
        shard[f"model.layers.{layer}.mlp.experts.bank"] = torch.ones(3, 8, 8, dtype=torch.int8)
    source = model.write(tmp_path)
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4


@pytest.mark.parametrize("quantize", ["all", "missing"])
def test_experts_that_are_not_recognised_are_not_quantized(quantize: Quantize, tmp_path: Path) -> None:
    """A router under an unknown name would be quantized with them."""
    model = renamed("mlp.expert_list.{}")
    model.to_float("model.layers")
    with pytest.raises(UnsupportedError, match="experts-not-understood"):
        convert_checkpoint(model.write(tmp_path / "source"), "compressed-tensors", tmp_path / "out", quantize=quantize)


def exchanged(out: Path, one: str, other: str) -> None:
    """Exchange two tensors of one shape in an output, with their pieces and checksums in its manifest."""
    manifest = json.loads((out / "quarkconv.json").read_text())
    (shard,) = manifest["shards"]
    rows = {tensor["name"]: tensor for tensor in shard["tensors"]}
    rows[one]["pieces"], rows[other]["pieces"] = rows[other]["pieces"], rows[one]["pieces"]
    data = bytearray((out / shard["file"]).read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    spans = [slice(*(size + offset for offset in header[name]["data_offsets"])) for name in (one, other)]
    data[spans[0]], data[spans[1]] = data[spans[1]], data[spans[0]]
    (out / shard["file"]).write_bytes(data)
    assert shard["header"][1] == xxhash.xxh3_128_hexdigest(data[:size])
    (out / "quarkconv.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("target", ONE_BY_ONE)
@pytest.mark.parametrize("end", ["weight", "weight_scale"])
def test_exchanged_experts_are_found_though_the_manifest_agrees(target: str, end: str, tmp_path: Path) -> None:
    source = renamed("mlp.expert_list.{}").write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    if target == "bf16":
        end = "weight"
    one, other = (f"model.layers.0.mlp.expert_list.{expert}.up_proj.{end}" for expert in range(2))
    exchanged(out, one, other)
    assert verify_checkpoint(out, device="cpu").ok
    problems = verify_checkpoint(out, source, device="cpu").problems
    assert {problem.tensor for problem in problems} == {one, other}
    assert all("not from the tensor of the same name" in problem.message for problem in problems)


def test_a_module_that_is_left_out_is_found_though_the_manifest_agrees(tmp_path: Path) -> None:
    smaller = renamed("mlp.expert_list.{}")
    lost = "model.layers.1.mlp.expert_list.2.down_proj"
    source = renamed("mlp.expert_list.{}").write(tmp_path / "source")
    smaller.remove(lost)
    out = convert_checkpoint(smaller.write(tmp_path / "smaller"), "w8a8-int8", tmp_path / "out").output
    manifest = json.loads((out / "quarkconv.json").read_text())
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    manifest["sources"] = [[name, sizes[name]] for name, _ in manifest["sources"]]
    (out / "quarkconv.json").write_text(json.dumps(manifest))
    problems = verify_checkpoint(out, source, device="cpu").problems
    assert f"{lost}.weight" in {problem.tensor for problem in problems if "the output does not" in problem.message}


@pytest.mark.parametrize(
    ("leaves", "method"),
    [
        (("qweight", "qzeros", "g_idx"), {"quant_method": "gptq", "bits": 8}),
        (("weight_packed", "weight_shape"), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        (("weight._data",), {"quant_method": "quanto", "weights": "int8"}),
    ],
    ids=["gptq", "packed", "quanto"],
)
def test_packed_experts_are_called_packed_and_not_unknown(
    leaves: tuple[str, ...], method: dict[str, Any], tmp_path: Path
) -> None:
    """vLLM 28274 and others: int8 weights in the forms of other tools."""
    model = Model()
    model.config["quantization_config"] = method
    for shard in model.shards:
        for name in [name for name in shard if ".experts." in name]:
            del shard[name]
            if name.endswith(".weight"):
                shard |= {name.removesuffix("weight") + leaf: torch.zeros(4, dtype=torch.int32) for leaf in leaves}
    found = finding(model.write(tmp_path), "experts-not-understood")
    assert "experts in a packed format" in found.message
    assert found.hint == "quarkconv converts symmetric INT8 W8A8 only"
    assert {refusal(tmp_path, target).exit_code for target in TARGETS} == {4}


def packed_for_cpus() -> Model:
    """Experts as kt-kernel packs them for AMX, one tensor for each expert, projection and NUMA node."""
    model = Model()
    for layer, shard in enumerate(model.shards):
        model.remove(f"model.layers.{layer}.mlp.experts")
        for name in ("gate", "up", "down"):
            for expert in range(3):
                module = f"blk.{layer}.ffn_{name}_exps.{expert}.numa.0"
                shard |= {f"{module}.weight": torch.ones(64, dtype=torch.int8), f"{module}.scale": torch.ones(4)}
    model.to_float("model.layers")
    return model


@pytest.mark.parametrize("declared", [True, False])
def test_experts_packed_for_cpus_are_experts_that_only_their_engine_reads(declared: bool, tmp_path: Path) -> None:
    model = packed_for_cpus()
    if not declared:
        del model.config["quantization_config"]
    source = model.write(tmp_path)
    found = finding(source, "experts-not-understood")
    assert (found.subject, found.count) == ("blk.0.ffn_down_exps.0.numa.0.scale", 36)
    assert "KTransformers" in found.hint
    if not declared:
        assert finding(source, "quant-config-missing").hint.startswith("tensors are stored in I8: ")
    assert {refusal(source, target).exit_code for target in TARGETS} == {4}


def test_experts_under_the_names_of_gguf_are_converted_under_them(tmp_path: Path) -> None:
    source = renamed_in_gguf().write(tmp_path / "source")
    found = finding(source, "experts-not-understood")
    assert (found.subject, found.count) == ("blk.0.ffn_down_exps", 6)
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    before, after = load(source), load(out)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("_exps.weight"))


def renamed_in_gguf() -> Model:
    """All experts of a layer in one linear of three dimensions for each projection, ``blk.0.ffn_gate_exps``."""
    model = stacked()
    names = {"bank_in": "ffn_gate_exps", "bank_up": "ffn_up_exps", "bank_out": "ffn_down_exps"}
    for layer, shard in enumerate(model.shards):
        for old, new in names.items():
            for end in ("weight", "weight_scale"):
                shard[f"blk.{layer}.{new}.{end}"] = shard.pop(f"model.layers.{layer}.mlp.{old}.{end}")
    return model


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_weights_of_another_dtype_without_a_config_are_not_called_unquantized(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Model()
    del model.config["quantization_config"]
    model.to_float("model.layers")
    model.set("model.layers.0.self_attn.o_proj.weight", torch.ones(8, 8).to(dtype))
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32"}[dtype]
    assert finding(model.write(tmp_path), "quant-config-missing").hint.startswith(f"tensors are stored in {name}: ")
