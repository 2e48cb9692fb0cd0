"""Scales, zero points and other tensors beside weights."""

from __future__ import annotations

from typing import Final

import torch

from support.findings import EXPERTS, MIXED, O_PROJ, Case, remove, set_tensor
from support.findings.claims import per_tensor_attention
from support.model import int8_linear
from support.quark_config import STATIC_INPUT

CASES: Final = (
    Case("no scale", (("error", "scale-missing", O_PROJ, 1),), remove(f"{O_PROJ}.weight_scale")),
    Case(
        "static activations declared, no input scale",
        (("error", "scale-missing", O_PROJ, 2), MIXED),
        lambda model: per_tensor_attention(model, inputs=STATIC_INPUT),
    ),
    Case(
        "a scale too short", (("error", "scale-shape", O_PROJ, 1),), set_tensor(f"{O_PROJ}.weight_scale", torch.rand(3))
    ),
    Case(
        "a scale in F64",
        (("error", "scale-dtype", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.rand(8).double()),
    ),
    Case(
        "codes that are declared in another dtype",
        (("error", "dtype-mismatch", f"{EXPERTS}.0.down_proj", 20),),
        lambda model: model.quantization["global_quant_config"]["weight"].update(dtype="int4"),
    ),
    Case(
        "factors of inputs beside the weight",
        (
            ("error", "smoothing-online", f"{O_PROJ}.pre_quant_scale", 1),
            ("warning", "tensor-unrecognised", f"{O_PROJ}.pre_quant_scale", 1),
        ),
        set_tensor(f"{O_PROJ}.pre_quant_scale", torch.ones(8)),
    ),
    Case(
        "a tensor of unknown meaning beside the weight",
        (("warning", "companion-unknown", f"{O_PROJ}.permutation", 1),),
        set_tensor(f"{O_PROJ}.permutation", torch.arange(8)),
    ),
    Case(
        "a scale of an output that the config does not declare",
        (("warning", "output-scales", f"{O_PROJ}.output_scale", 1),),
        set_tensor(f"{O_PROJ}.output_scale", torch.tensor(0.5)),
    ),
    Case(
        "a bias that the config does not declare",
        (("warning", "linear-biases", f"{O_PROJ}.bias", 1),),
        set_tensor(f"{O_PROJ}.bias", torch.ones(8)),
    ),
    Case(
        "a scale in BF16",
        (("info", "scale-narrow", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.ones(8).bfloat16()),
    ),
    Case(
        "a scale in F16",
        (("info", "scale-narrow", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.ones(8).half()),
    ),
    Case(
        "a scale that is NaN",
        (("error", "scale-invalid", f"{O_PROJ}.weight_scale", 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.tensor([1.0] * 7 + [float("nan")])),
        deep=True,
    ),
    Case(
        "a scale with a negative value",
        (("info", "scale-negative", f"{O_PROJ}.weight_scale", 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.tensor([1.0] * 7 + [-0.5])),
        deep=True,
    ),
    Case(
        "a zero point",
        (("info", "zero-point-present", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_zero_point", torch.zeros(8, dtype=torch.int8)),
        deep=True,
    ),
    Case(
        "a zero point of another shape",
        (("error", "zero-point-shape", O_PROJ, 1), ("info", "zero-point-present", O_PROJ, 1)),
        set_tensor(f"{O_PROJ}.weight_zero_point", torch.zeros(1, dtype=torch.int8)),
    ),
    Case(
        "a zero point that is not zero",
        (
            ("error", "zero-point-nonzero", f"{O_PROJ}.weight_zero_point", 1),
            ("info", "zero-point-present", O_PROJ, 1),
        ),
        set_tensor(f"{O_PROJ}.weight_zero_point", torch.tensor([0] * 7 + [-1], dtype=torch.int8)),
        deep=True,
    ),
    Case(
        "codes without a module",
        (("warning", "tensor-unrecognised", "model.codes", 1),),
        set_tensor("model.codes", torch.zeros(4, dtype=torch.int8)),
    ),
    Case(
        "a scale without a weight",
        (("warning", "tensor-unrecognised", "model.lost.weight_scale", 1),),
        set_tensor("model.lost.weight_scale", torch.rand(8)),
    ),
    Case(
        "an expert numbered twice",
        (("warning", "tensor-unrecognised", f"{EXPERTS}.01.gate_proj", 1),),
        lambda model: model.first.update(int8_linear(f"{EXPERTS}.01.gate_proj", 4, 8)),
    ),
)
