"""``bf16``: the dequantized model, for evaluation and for engines without INT8.

Each weight is code times scale in F32, rounded once to BF16. Names are those of the unquantized model, so that
transformers and every engine load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from quarkconv.description.description import Description
from quarkconv.plan.experts import Int8Module, dequantized
from quarkconv.plan.pieces import OutputTensor
from quarkconv.scheme.companions import describes_activations
from quarkconv.targets.base import Int8Count
from quarkconv.targets.per_expert import PerExpertTarget


class Bf16(PerExpertTarget):
    """The target ``bf16``."""

    name = "bf16"
    summary = "dequantized, without quantization_config; loads everywhere, for evaluation"
    quantizes = False
    facts = "Each weight is its int8 code times its scale, computed in float32 and rounded once to bfloat16."

    def module_tensors(self, module: Int8Module) -> Iterator[OutputTensor]:
        yield dequantized(module)

    def module_bytes(self, shape: tuple[int, ...], static: int) -> int:  # noqa: ARG002
        return 2 * prod(shape)

    def output_bytes(self, description: Description, modules: Sequence[Int8Count]) -> int:
        size = super().output_bytes(description, modules)
        for form, count, _ in modules:  # the companions of a module are left out with it
            size += count * sum(kind.nbytes for kind in (form.input_scale, form.input_zero_point) if kind is not None)
        return size

    def dropped(self, description: Description) -> list[str]:
        stored, forms = description.stored, (form for form, _ in description.modules.groups)
        if not (
            stored.output_scales
            or stored.unrecognised
            or any(form.input_scale or form.input_zero_point for form in forms)
        ):
            return []
        return [name for name in description.checkpoint.types if describes_activations(name)]

    def config(self, description: Description) -> dict[str, Any]:
        config = description.config.with_quantization(None)
        return {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
