"""The base of targets that name experts as the unquantized model does."""

from __future__ import annotations

from collections.abc import Iterator

from quarkconv.experts.layer import MoELayer
from quarkconv.plan.experts import ExpertSource, expert_modules
from quarkconv.plan.pieces import Check, OutputTensor
from quarkconv.targets.base import Target


class PerExpertTarget(Target):
    """A target with an ``experts.N.gate_proj`` for every expert, or ``moe.gate_proj`` in 3-key models.

    Projections of experts are written as any other int8 linear: see :meth:`Target.module_tensors`. So are experts that
    are not understood, under the names that they have.
    """

    stacks = False

    def expert_tensors(self, source: ExpertSource) -> Iterator[OutputTensor]:
        for module in expert_modules(source):
            yield from self.module_tensors(module)

    def expert_checks(self, source: ExpertSource) -> Iterator[Check]:
        if source.layer.static:
            for module in expert_modules(source):
                yield from self.module_checks(module)

    def expert_bytes(self, layer: MoELayer) -> int:
        down = self.module_bytes((layer.hidden, layer.intermediate), layer.static)
        ups = (len(roles) * layer.intermediate for _, roles in layer.leaves() if "down" not in roles)
        return layer.experts * (sum(self.module_bytes((rows, layer.hidden), layer.static) for rows in ups) + down)
