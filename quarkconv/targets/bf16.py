"""``bf16``: the dequantized model, for evaluation and for engines without INT8.

Each weight is code times scale in F32, rounded once to BF16. Names are those of the unquantized model, so that
transformers and every engine load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap
from math import prod
from typing import Any

from quarkconv.description.description import Description
from quarkconv.findings import Finding, finding
from quarkconv.plan.experts import Int8Module
from quarkconv.plan.pieces import OutputTensor, Weights
from quarkconv.scheme.companions import describes_activations
from quarkconv.scheme.stored import linear_names
from quarkconv.targets.base import Int8Count
from quarkconv.targets.per_expert import PerExpertTarget
from quarkconv.targets.settings import dropped_settings


class Bf16(PerExpertTarget):
    """The target ``bf16``."""

    name = "bf16"
    summary = "dequantized, without quantization_config; loads everywhere, for evaluation"
    facts = "Each weight is its int8 code times its scale, computed in float32 and rounded once to bfloat16."

    def module_tensors(self, module: Int8Module) -> Iterator[OutputTensor]:
        pieces = tuple(starmap(Weights, zip(module.codes, module.scales, strict=True)))
        yield OutputTensor(linear_names(module.name).weight, "BF16", module.shape, pieces)

    def module_bytes(self, shape: tuple[int, ...], static: int) -> int:  # noqa: ARG002
        return 2 * prod(shape)

    def output_bytes(self, description: Description, modules: Sequence[Int8Count]) -> int:
        size, types = super().output_bytes(description, modules), description.checkpoint.types
        for form, count, _ in modules:  # the companions of a module are left out with it
            size += count * sum(kind.nbytes for kind in (form.input_scale, form.input_zero_point) if kind is not None)
        return size - sum(types[name].nbytes for name in _of_activations(description))

    def drops(self, name: str) -> bool:
        return describes_activations(name)

    def config(self, description: Description) -> dict[str, Any]:
        config = description.config.with_quantization(None)
        return {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in config.items()}

    def losses(self, description: Description) -> Iterator[Finding]:
        yield from dropped_settings(description, self.name, kept=())
        names = _of_activations(description)
        if names:
            message = f"Scales and zero points of activations are left out: {len(names)}, first {names[0]}"
            yield finding("tensor-dropped", names[0], message, count=len(names))


def _of_activations(description: Description) -> list[str]:
    return [name for name in description.checkpoint.types if describes_activations(name)]
