"""``compressed-tensors``: experts one by one, as the library of that name and vLLM 0.28 and later read them.

    P.N.gate_proj.weight         I8   [I, H]
    P.N.gate_proj.weight_scale   F32  [I, 1]
    P.N.gate_proj.input_scale    F32  []       static activation scales only

and the same for ``up_proj`` and ``down_proj``, under whatever names the source has; in 3-key models ``moe.gate_proj``
with [E, I, H] and [E, I, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from quarkconv.description.description import Description
from quarkconv.findings import Finding
from quarkconv.scheme.companions import name_in_engines
from quarkconv.targets.compressed_tensors_config import (
    compressed_tensors_config,
    compressed_tensors_keeps,
    compressed_tensors_losses,
)
from quarkconv.targets.per_expert import PerExpertTarget


class CompressedTensors(PerExpertTarget):
    """The target ``compressed-tensors``."""

    name = "compressed-tensors"
    summary = "experts one by one; loads in vLLM 0.28 and later, and in SGLang with --quantization w8a8_int8"
    transforms = True
    keeps_fp8 = True

    def config(self, description: Description) -> dict[str, Any]:
        return compressed_tensors_config(description)

    def renamed(self, name: str) -> str:
        return name_in_engines(name)

    def keeps_output_scale(self, description: Description) -> Callable[[str], bool]:
        return compressed_tensors_keeps(description)

    def losses(self, description: Description) -> Iterator[Finding]:
        return compressed_tensors_losses(description, self.name)
