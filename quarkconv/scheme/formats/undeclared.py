"""The scheme of checkpoints without a quantization_config, which their tensors or the user name.

Channel INT8 is published without a config: meituan's DeepSeek-R1-Channel-INT8 (written by SGLang users'
``bf16_cast_channel_int8.py``: weight I8 [out, in], weight_scale F32 [out, 1]), Hygon's Channel-INT8 models. Engines are
then given ``--quantization w8a8_int8`` by hand, which quantizes activations per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.spec import FLOAT, PER_CHANNEL, PTPC, PTPC_NAME, ModuleScheme
from quarkconv.scheme.stored import StoredModules


class UndeclaredScheme(DeclaredScheme):
    """ptpc_int8 for every module that is stored in int8."""

    names: ClassVar[Mapping[ModuleScheme, str]] = {PTPC: PTPC_NAME}

    def __init__(self, stored: StoredModules) -> None:
        super().__init__("none", None)
        self.default = PTPC
        self._int8 = {module for module, form in stored if form.quantized}

    def resolve(self, module: str) -> ModuleScheme:
        return PTPC if module in self._int8 else FLOAT


def leaves_no_doubt(stored: StoredModules) -> bool:
    """Whether the tensors alone show ptpc_int8: every int8 weight has an F32 scale for each row, and nothing else."""
    forms = {form for form in (*stored.linears.values(), *stored.fused.values()) if form.quantized}
    return bool(forms) and all(
        form.granularity == PER_CHANNEL
        and form.scale is not None
        and form.scale.dtype == "F32"
        and form.input_scale is None
        and not any(form.zero_points)
        for form in forms
    )
