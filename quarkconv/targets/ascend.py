"""``ascend``: the format of Ascend's msModelSlim, which vllm-ascend and SGLang on Ascend NPUs load.

    P.N.gate_proj.weight          I8   [I, H]
    P.N.gate_proj.weight_scale    F32  [I, 1]
    P.N.gate_proj.weight_offset   F32  [I, 1]   zeros: the codes are symmetric

``quant_model_description.json`` has an entry for every tensor of the output, ``W8A8_DYNAMIC`` or ``FLOAT``; config.json
has no quantization_config. :mod:`quarkconv.scheme.formats.ascend` has the sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from quarkconv.description.description import Description
from quarkconv.description.disagreements import merged_unlike
from quarkconv.headers.file_names import ASCEND_NAME
from quarkconv.plan.experts import Int8Module
from quarkconv.plan.pieces import OutputTensor, TextFile, Zeros
from quarkconv.scheme.companions import name_in_engines
from quarkconv.scheme.form import linear_names
from quarkconv.scheme.formats.ascend import DYNAMIC, UNQUANTIZED
from quarkconv.targets.per_expert import PerExpertTarget

_F32 = 4


class Ascend(PerExpertTarget):
    """The target ``ascend``."""

    name = "ascend"
    summary = "experts one by one, as msModelSlim writes them; for vllm-ascend and SGLang on Ascend NPUs"
    static_inputs = False

    def unsupported(self, description: Description) -> str | None:
        unlike = merged_unlike(description.others, description.stored.linears, self.float_modules(description))
        if unlike:
            return f"{unlike[0]} is not int8, and engines merge it with linears that are"
        return super().unsupported(description)

    def module_tensors(self, module: Int8Module) -> Iterator[OutputTensor]:
        yield from super().module_tensors(module)
        shape = (*module.shape[:-1], 1)
        zeros = Zeros(module.codes[0], _F32 * prod(shape))
        yield OutputTensor(linear_names(module.name).offset, "F32", shape, (zeros,))

    def module_bytes(self, shape: tuple[int, ...], static: int) -> int:
        return super().module_bytes(shape, static) + _F32 * prod(shape[:-1])

    def config(self, description: Description) -> dict[str, Any]:
        return description.config.with_quantization(None)

    def texts(self, tensors: Sequence[OutputTensor]) -> Iterator[TextFile]:
        names = {tensor.name for tensor in tensors}
        dynamic: set[str] = set()
        for name in names:
            module = name.removesuffix(".weight_offset")
            if module != name:
                dynamic.update(names.intersection(linear_names(module)))
        description: dict[str, Any] = {
            "model_quant_type": DYNAMIC,
            "version": "1.0.0",
            "group_size": 0,
            "metadata": {},
            "optional": {},
            **{tensor.name: DYNAMIC if tensor.name in dynamic else UNQUANTIZED for tensor in tensors},
        }
        yield TextFile(ASCEND_NAME, json.dumps(description, indent=2, ensure_ascii=False) + "\n")

    def renamed(self, name: str) -> str:
        return name_in_engines(name)
