"""What each target that keeps the model's names makes of a Quark export: a few lines of torch for each rule."""

from __future__ import annotations

import torch

from support.writing import Tensors, with_engine_names

COMPANIONS = (".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point")
OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")


def expected_tensors(source: Tensors, target: str) -> Tensors:
    """The tensors of the output, from those of a Quark export."""
    expected = {
        name: tensor for name, tensor in source.items() if not (target == "bf16" and name.endswith(OF_ACTIVATIONS))
    }
    for name, codes in source.items():
        module = name.removesuffix(".weight")
        if module == name or codes.dtype != torch.int8:
            continue
        for end in COMPANIONS:
            expected.pop(module + end, None)
        *lead, out, _ = codes.shape
        stored = source[f"{module}.weight_scale"].float()
        scale = stored.reshape(*lead, -1).expand(*lead, out)
        static = source.get(f"{module}.input_scale")
        if target == "bf16":
            expected[name] = (codes.float() * scale.unsqueeze(-1)).bfloat16()
            continue
        if static is not None:
            expected[f"{module}.input_scale"] = static.float()
        if target == "quark":
            expected[f"{module}.weight_scale"] = scale if static is None else scale[..., 0]
        else:
            expected[f"{module}.weight_scale"] = scale.unsqueeze(-1)
    return with_engine_names(expected) if target == "compressed-tensors" else expected
