"""Ascend's format: checkpoints as msModelSlim writes them are read, and the target writes an entry for every tensor.

``ascend_export`` follows msModelSlim's writer, ``core/quant_service/modelslim_v1/save/ascendv1.py``: names, dtypes,
shapes, files, and the fields of the description. ``convert/test_other_tools.py`` has a checkpoint that it wrote itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import assert_same_tensors, load, make_checkpoint
from support.program import run_cli

import quarkconv
from quarkconv.errors import SourceError, UnsupportedError

DESCRIPTION = "quant_model_description.json"
CODES = ".weight_offset"


def ascend_export(folder: Path, *, single: bool = False) -> Path:
    """A checkpoint of 2 MoE layers as msModelSlim writes W8A8_DYNAMIC."""
    model = make_checkpoint(folder / "quark", layers=2)
    tensors: dict[str, torch.Tensor] = {}
    description: dict[str, Any] = {}
    for name, tensor in load(model).items():
        if name.endswith(".weight_scale"):
            tensors[name] = tensor.float().reshape(-1, 1)
            tensors[name.replace("_scale", "_offset")] = torch.zeros(len(tensor), 1)
        else:
            tensors[name] = tensor
    dynamic = {name.removesuffix(CODES) for name in tensors if name.endswith(CODES)}
    for name in tensors:
        module = name.rpartition(".")[0]
        description[name] = "W8A8_DYNAMIC" if module in dynamic and not name.endswith(".bias") else "FLOAT"
    description |= {
        "version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0, "optional": {},
    }  # fmt: skip
    out = folder / "ascend"
    out.mkdir()
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    (out / DESCRIPTION).write_text(json.dumps(description, indent=2))
    names = sorted(tensors)
    halves = [names] if single else [names[::2], names[1::2]]
    files = [
        "quant_model_weights.safetensors"
        if single
        else f"quant_model_weights-{number:05d}-of-{len(halves):05d}.safetensors"
        for number in range(1, len(halves) + 1)
    ]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name].contiguous() for name in half}, out / file)
    if not single:
        weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (out / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    return out


def change_description(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / DESCRIPTION
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize("single", [False, True])
def test_an_export_is_read_as_ptpc_int8(tmp_path: Path, single: bool) -> None:
    inspection = quarkconv.inspect_checkpoint(ascend_export(tmp_path, single=single)).to_json()
    assert (inspection["scheme"], inspection["quant_method"]) == ("ptpc_int8", "ascend")
    assert [item["code"] for item in inspection["findings"]] == ["zero-point-present"]
    assert all(target["supported"] for target in inspection["targets"].values())


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "quark", "bf16", "ascend"])
def test_every_target_is_the_same_from_ascend_and_from_quark(tmp_path: Path, target: str) -> None:
    root = ascend_export(tmp_path)
    outputs = [
        quarkconv.convert_checkpoint(source, target, tmp_path / f"{source.name}-out").output
        for source in (root, tmp_path / "quark")
    ]
    assert_same_tensors(load(outputs[0]), load(outputs[1]))
    configs = [json.loads((output / "config.json").read_text()) for output in outputs]
    assert configs[0] == configs[1]
    assert (outputs[0] / DESCRIPTION).exists() == (target == "ascend")
    for output in outputs:
        assert quarkconv.verify_checkpoint(output, root if output is outputs[0] else None, "cpu", tokens=2).ok


def test_the_target_is_what_msmodelslim_writes(tmp_path: Path) -> None:
    root = ascend_export(tmp_path)
    output = quarkconv.convert_checkpoint(tmp_path / "quark", "ascend", tmp_path / "out").output
    assert_same_tensors(load(output), load(root))
    assert json.loads((output / DESCRIPTION).read_text()) == json.loads((root / DESCRIPTION).read_text())
    assert json.loads((output / "config.json").read_text()) == json.loads((root / "config.json").read_text())


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
def test_every_tensor_has_an_entry(tmp_path: Path, layout: str) -> None:
    source = make_checkpoint(tmp_path / "model", layout=layout, family="w1")
    output = quarkconv.convert_checkpoint(source, "ascend", tmp_path / "out").output
    description, tensors = json.loads((output / DESCRIPTION).read_text()), load(output)
    entries = {name: kind for name, kind in description.items() if "." in name}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            assert {entries[name], entries[f"{name}_scale"], entries[f"{name}_offset"]} == {"W8A8_DYNAMIC"}
            assert not tensors[f"{name}_offset"].any()
            assert tensors[f"{name}_offset"].shape == tensors[f"{name}_scale"].shape
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert quarkconv.inspect_checkpoint(output).to_json()["scheme"] == "ptpc_int8"


def test_an_offset_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    root = ascend_export(tmp_path, single=True)
    file = root / "quant_model_weights.safetensors"
    tensors = load(root)
    name = "model.layers.1.mlp.experts.2.up_proj.weight_offset"
    tensors[name][3] = 1.0
    save_file(tensors, file)
    with pytest.raises(UnsupportedError, match="not zero") as caught:
        quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out")
    assert caught.value.tensor == name
    assert [item.code for item in quarkconv.inspect_checkpoint(root, deep=True).findings if item.subject == name] == [
        "zero-point-nonzero"
    ]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no entry": (lambda description: description.pop(Q_PROJ), "without a valid entry"),
    "an entry of another type": (lambda description: description.update({Q_PROJ: 3}), "without a valid entry"),
    "a tensor that is not stored": (lambda description: description.update({"a.weight": "FLOAT"}), "not stored"),
    "two types in qkv": (lambda description: description.update({Q_PROJ: "FLOAT"}), "of several types"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_description_that_disagrees_is_reported_and_corrected(tmp_path: Path, damage: str) -> None:
    root = ascend_export(tmp_path)
    change, message = DAMAGES[damage]
    change_description(root, change)
    found = [item for item in quarkconv.inspect_checkpoint(root).findings if item.code == "description-mismatch"]
    assert [message in item.message for item in found] == [True]
    output = quarkconv.convert_checkpoint(root, "ascend", tmp_path / "out").output
    assert not [item for item in quarkconv.inspect_checkpoint(output).findings if item.code == "description-mismatch"]


def make_static(root: Path) -> None:
    """Make q_proj static, which stores other tensors."""
    tensors = load(root)
    head = Q_PROJ.removesuffix("weight")
    rows = len(tensors[Q_PROJ])
    for leaf in ("weight_scale", "weight_offset"):
        del tensors[head + leaf]
    tensors |= {
        f"{head}quant_bias": torch.zeros(rows, dtype=torch.int32), f"{head}deq_scale": torch.ones(rows),
        f"{head}input_scale": torch.ones(1), f"{head}input_offset": torch.zeros(1),
    }  # fmt: skip
    save_file(tensors, root / "quant_model_weights.safetensors")

    def change(description: dict[str, Any]) -> None:
        for name in [name for name in description if name.startswith(head)]:
            del description[name]
        description.update({name: "W8A8" for name in tensors if name.startswith(head)})

    change_description(root, change)


def rotate(root: Path) -> None:
    (root / "optional").mkdir()
    save_file({"global_rotation": torch.eye(4)}, root / "optional" / "quarot.safetensors")


UNSUPPORTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "W8A8 static": (make_static, "type W8A8:"),
    "a type of another name": (
        lambda root: change_description(root, lambda value: value.update({Q_PROJ: "W4A8_DYNAMIC"})),
        "type W4A8_DYNAMIC:",
    ),
    "rotation tensors": (rotate, "rotations"),
    "rotations in the description": (
        lambda root: change_description(root, lambda value: value.update(optional={"quarot": {"rotation_map": {}}})),
        "rotations",
    ),
    "a quantized cache": (
        lambda root: change_description(root, lambda value: value.update(kv_quant_type="C8")),
        "key-value cache",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_converted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    root = ascend_export(tmp_path, single=True)
    change, message = UNSUPPORTED[case]
    change(root)
    findings = quarkconv.inspect_checkpoint(root).findings
    codes = {item.code for item in findings}
    assert [message.rstrip(":") in item.message for item in findings if item.code == "scheme-unsupported"] == [True]
    assert not codes & {"scale-missing", "granularity-mismatch"}
    code, _, err = run_cli(capsys, "convert", root, "--to", "fused-int8", "--out", tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (4, False)
    assert message in err


def test_a_description_that_is_not_an_object_is_an_error(tmp_path: Path) -> None:
    root = ascend_export(tmp_path)
    (root / DESCRIPTION).write_text("[]")
    with pytest.raises(SourceError) as caught:
        quarkconv.convert_checkpoint(root, "quark", tmp_path / "out")
    assert caught.value.exit_code == 3


def test_static_activations_have_no_place(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", granularity="per_tensor", input_scales=True)
    with pytest.raises(UnsupportedError, match="static activation scales"):
        quarkconv.convert_checkpoint(source, "ascend", tmp_path / "out")


def test_every_target_in_turn_leads_back_to_the_tensors_of_the_export(tmp_path: Path) -> None:
    start = ascend_export(tmp_path)
    source = start
    for target in ("fused-int8", "w8a8-int8", "quark", "compressed-tensors", "ascend", "fused-int8", "ascend"):
        out = quarkconv.convert_checkpoint(source, target, tmp_path / f"{source.name} to {target}").output
        verification = quarkconv.verify_checkpoint(out, source, device="cpu", tokens=2)
        assert verification.verdict() == "Verified"
        assert quarkconv.inspect_checkpoint(out, deep=True).ok
        source = out
    assert_same_tensors(load(source), load(start))
    first, last = ((folder / DESCRIPTION).read_text() for folder in (start, source))
    types = [{name: kind for name, kind in json.loads(text).items() if "." in name} for text in (first, last)]
    assert types[0] == types[1]
