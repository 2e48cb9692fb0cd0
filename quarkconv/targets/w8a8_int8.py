"""``w8a8-int8``: the tensors of ``compressed-tensors`` under the config that SGLang reads.

SGLang: ``srt/layers/quantization/w8a8_int8.py``, class ``W8A8Int8Config``. Activations are always quantized per token.
"""

from __future__ import annotations

from typing import Any

from quarkconv.description.description import Description
from quarkconv.targets.ignored import ignored_modules
from quarkconv.targets.per_expert import PerExpertTarget


class W8A8Int8(PerExpertTarget):
    """The target ``w8a8-int8``."""

    name = "w8a8-int8"
    summary = "experts one by one; loads in SGLang on CUDA"
    static_inputs = False
    engine = "sglang"

    def config(self, description: Description) -> dict[str, Any]:
        ignored = ignored_modules(description, self.float_modules(description))
        return description.config.with_quantization({"quant_method": "w8a8_int8", "ignore": ignored})
