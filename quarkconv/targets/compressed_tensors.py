"""``compressed-tensors``: experts one by one, as the library of that name and vLLM 0.28 and later read them.

    P.N.gate_proj.weight         I8   [I, H]
    P.N.gate_proj.weight_scale   F32  [I, 1]
    P.N.gate_proj.input_scale    F32  []       static activation scales only

and the same for ``up_proj`` and ``down_proj``, under whatever names the source has; in 3-key models ``moe.gate_proj``
with [E, I, H] and [E, I, 1].
"""

from __future__ import annotations

from quarkconv.targets.compressed_tensors_form import CompressedTensorsForm
from quarkconv.targets.per_expert import PerExpertTarget


class CompressedTensors(CompressedTensorsForm, PerExpertTarget):
    """The target ``compressed-tensors``."""

    name = "compressed-tensors"
    summary = "experts one by one; loads in vLLM 0.28 and later, and in SGLang with --quantization w8a8_int8"
