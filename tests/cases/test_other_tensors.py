"""Tensors that models do not have, and weights packed in fewer bits: named by every command, and not called sound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
import torch
from support.model import Model
from support.reported import codes, finding, load, losses, refusal

from quarkconv import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.targets import TARGETS

ATTENTION: Final = "model.layers.0.self_attn"
UNKNOWN: Final = (
    f"{ATTENTION}.r2", f"{ATTENTION}.fa3_q.scales", f"{ATTENTION}.kv_scale_inv", f"{ATTENTION}.q_proj.smoothing",
    "model.layers.0.mlp.codebook", "model.rotation", "hadamard",
)  # fmt: skip
KNOWN: Final = (
    f"{ATTENTION}.A_log", f"{ATTENTION}.sinks", f"{ATTENTION}.rotary_emb.inv_freq",
    "model.visual.blocks.0.gamma", "vision_tower.position_embedding",
)  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_that_models_do_not_have_is_not_sound_and_named_by_every_command(name: str, tmp_path: Path) -> None:
    model = Model()
    model.first[name] = torch.ones(8, 8)
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert (codes(source), finding(source, "tensor-unrecognised").subject) == ({"tensor-unrecognised": "warning"}, name)
    assert "tensors of unknown meaning" in inspection.not_checked
    assert not inspection.headline.startswith("Sound")
    assert not any(fact.verdict == "int8" for fact in inspection.engines)
    assert losses(source, "fused-int8") == {"tensor-unrecognised": [name]}
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert [item.subject for item in verify_checkpoint(out, source, device="cpu").findings] == [name]
    assert torch.equal(load(out)[name], model.first[name])


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_models_and_tensors_of_encoders_are_no_finding(name: str, tmp_path: Path) -> None:
    model = Model()
    model.first[name] = torch.ones(8)
    assert "tensor-unrecognised" not in codes(model.write(tmp_path))


_I32: Final = torch.zeros(1, 8, dtype=torch.int32)
PACKED: Final[Mapping[str, Mapping[str, torch.Tensor]]] = {
    "AWQ": {"qweight": _I32, "qzeros": _I32, "scales": torch.ones(1, 8).half()},
    "GPTQ": {"qweight": _I32, "qzeros": _I32, "scales": torch.ones(1, 8).half(), "g_idx": torch.zeros(8).int()},
    "compressed-tensors": {
        "weight_packed": _I32.T.contiguous(), "weight_scale": torch.ones(8, 1), "weight_shape": torch.tensor([8, 8])
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", PACKED)
def test_attention_packed_in_fewer_bits_is_unsupported(tool: str, tmp_path: Path) -> None:
    model = Model()
    model.first |= {f"{ATTENTION}.q_proj.{leaf}": tensor.clone() for leaf, tensor in PACKED[tool].items()}
    source = model.write(tmp_path)
    found = finding(source, "scheme-unsupported")
    assert (found.severity, found.count, found.subject.startswith(f"{ATTENTION}.q_proj.")) == ("error", 1, True)
    assert set(codes(source)) == {"scheme-unsupported"}
    assert {refusal(source, target).exit_code for target in TARGETS} == {4}


def test_no_engine_is_said_to_run_scales_of_unknown_meaning(tmp_path: Path) -> None:
    model = Model()
    model.first[f"{ATTENTION}.o_proj.weight_scale_2"] = torch.ones(())
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert inspection.engines
    assert {fact.verdict for fact in inspection.engines} <= {"not checked", "fails", "wrong"}
    assert all(
        fact.note.endswith("without tensors of unknown meaning")
        for fact in inspection.engines
        if fact.verdict == "not checked" and not fact.devices and fact.engine == "vllm"
    )
