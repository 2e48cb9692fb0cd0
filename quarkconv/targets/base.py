"""The base class of targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

from quarkconv.description.description import Description
from quarkconv.description.expert_names import identity_tensors
from quarkconv.description.fp8 import block_scale
from quarkconv.experts.layer import MoELayer
from quarkconv.plan.experts import ExpertSource, Int8Module
from quarkconv.plan.pieces import Check, OutputTensor, TextFile
from quarkconv.scheme.form import Form, linear_names
from quarkconv.text import examples, plural


class Target(ABC):
    """A format to convert to. A subclass is one file in :mod:`quarkconv.targets`.

    Attributes:
        name: as given to ``--to``.
        summary: one line for people.
        stacks: whether experts of a layer share tensors; False for targets that write every module as it is stored.
        by_rank: whether the experts can be divided among ranks.
        static_inputs: False when the scales of activations are always computed for each token.
        keeps_fp8: True when the config can express modules in FP8 beside INT8 experts.
        transforms: True when the config can express transforms that are computed at run time.
        engine: the only engine that loads it, as the table of engines names it; None for several.
        quantizes: False when the output has no quantized weights.
        facts: one sentence on the weights of the output, for the model card.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    stacks: ClassVar[bool] = True
    by_rank: ClassVar[bool] = False
    engine: ClassVar[str | None] = None
    quantizes: ClassVar[bool] = True
    transforms: ClassVar[bool] = False
    static_inputs: ClassVar[bool] = True
    keeps_fp8: ClassVar[bool] = False
    facts: ClassVar[str] = "The int8 codes are those of the source, bit for bit, and so are the values of the scales."

    def unsupported(self, description: Description) -> str | None:
        """The reason why this target cannot represent a valid checkpoint; None if it can."""
        unread = description.renamed_experts if not self.stacks else []
        if not description.moe_layers and not unread:
            return "it has no routed experts"
        for layer in description.moe_layers:
            if layer.partly_quantized:
                return f"{layer.prefix} mixes experts in int8 and in float"
        if not description.int8_layers and not unread:
            return "its experts are stored in float"
        if description.fp8 and not self.keeps_fp8:
            names = [name for group in description.fp8 for name in group.modules]
            reason = f"it has {plural(len(names), 'linear')} in FP8 beside INT8 experts: {examples(names)}"
            return reason + ("; --mtp drop leaves them out" if all(map(description.is_mtp, names)) else "")
        if description.scheme is None:
            return "it has int8 modules that are not W8A8"
        if description.static and not self.static_inputs:
            return f"it has static activation scales, but {self.name} computes scales per token"
        source = description.config.quantization
        if not self.transforms and isinstance(source, dict) and source.get("transform_config"):
            return "it has transforms at run time (transform_config)"
        if self.quantizes and len({scheme.activation for scheme in description.schemes}) > 1:
            return "it mixes static and dynamic activation scales, but a config group has only one kind"
        return None

    def float_modules(self, description: Description) -> tuple[str, ...]:
        """The int8 modules that are dequantized: those that engines, or its only engine, keep in float."""
        return (*description.float_modules, *description.float_modules_of.get(self.engine or "", ()))

    @abstractmethod
    def expert_tensors(self, source: ExpertSource) -> Iterator[OutputTensor]:
        """The output tensors of the routed experts of one layer."""

    @abstractmethod
    def expert_bytes(self, layer: MoELayer) -> int:
        """Size of :meth:`expert_tensors` in bytes, without planning them."""

    @abstractmethod
    def config(self, description: Description) -> dict[str, Any]:
        """The config.json of the output."""

    def texts(self, tensors: Sequence[OutputTensor]) -> Iterator[TextFile]:  # noqa: ARG002
        """Files beside config.json, made of all output tensors."""
        yield from ()

    def kept_settings(self, description: Description) -> Collection[str]:  # noqa: ARG002
        """The settings of the source that the output has; see :func:`quarkconv.targets.settings.dropped_settings`."""
        return ()

    def renamed(self, name: str) -> str:
        """The output name of the scale of a quantized output, such as one of the key-value cache."""
        return name

    def keeps_output_scale(self, description: Description) -> Callable[[str], bool]:  # noqa: ARG002
        """A test of the scales of quantized outputs: True for those whose setting is in the output."""
        return lambda _: False

    def dropped(self, description: Description) -> list[str]:
        """The tensors outside of int8 modules that the output does not have."""
        keeps = self.keeps_output_scale(description)
        return [name for name in description.stored.output_scales if not keeps(name)]

    def expert_checks(self, source: ExpertSource) -> Iterator[Check]:  # noqa: ARG002
        """Conditions on a layer's data under which :meth:`expert_tensors` is exact."""
        yield from ()

    def module_checks(self, module: Int8Module) -> Iterator[Check]:  # noqa: ARG002
        """Conditions on a module's data under which :meth:`module_tensors` is exact."""
        yield from ()

    def module_tensors(self, module: Int8Module) -> Iterator[OutputTensor]:
        """The output tensors of an int8 linear: codes as they are, weight_scale F32 [out, 1], no zero point.

        A scale per tensor is repeated over the rows, a 16-bit scale is widened; both are exact.
        """
        names = linear_names(module.name)
        yield OutputTensor(names.weight, "I8", module.shape, module.codes)
        yield OutputTensor(names.scale, "F32", (*module.shape[:-1], 1), module.scales)
        if module.input_scales:
            yield OutputTensor(names.input_scale, "F32", module.input_shape, module.input_scales)

    def module_bytes(self, shape: tuple[int, ...], static: int) -> int:
        """Size of :meth:`module_tensors` in bytes, without planning them.

        Args:
            shape: of the weight.
            static: number of static input scales.
        """
        return prod(shape) + 4 * prod(shape[:-1]) + 4 * static

    def output_bytes(self, description: Description, modules: Sequence[Int8Count]) -> int:
        """Size of all output tensors in bytes, without planning them.

        Args:
            description: the source.
            modules: of :func:`count_int8`; counted once for all targets.
        """
        size = description.checkpoint.tensor_bytes
        for form, count, linears in modules:
            size -= count * sum(kind.nbytes for kind in form.tensors if kind is not None)
            if linears:
                size += linears * self._linear_bytes(form)
        for name in self.float_modules(description):
            form = description.stored.linears[name]
            size += 2 * prod(form.weight.shape) - self._linear_bytes(form)
        for group in description.fp8 if self.keeps_fp8 else ():
            for name in group.modules:
                form = description.stored.linears[name]
                scale = description.checkpoint.types[block_scale(name, description.checkpoint.types)]
                kinds = [kind for kind in (scale, form.input_scale) if kind is not None]
                size += sum(4 * prod(kind.shape) - kind.nbytes for kind in kinds)
        stored, types = description.stored.linears, description.checkpoint.types
        identities = identity_tensors(description.moe_layers, types)  # int8 ones are among the modules
        in_float = [name for name in identities if not stored[name.rpartition(".")[0]].quantized]
        size -= sum(types[name].nbytes for name in (*self.dropped(description), *in_float))
        return size + sum(map(self.expert_bytes, description.int8_layers))

    def _linear_bytes(self, form: Form) -> int:
        """Size of :meth:`module_tensors` of a linear of this form, in bytes."""
        return self.module_bytes(form.weight.shape, 0 if form.input_scale is None else prod(form.input_scale.shape))


class Int8Count(NamedTuple):
    """How many int8 modules have a form, and how many of them are linears outside of the routed experts."""

    form: Form
    modules: int
    linears: int


def count_int8(description: Description) -> list[Int8Count]:
    """Count the int8 modules of a checkpoint by their form."""
    others = description.others
    return [
        Int8Count(form, len(modules), len(others[form, declared]))
        for (form, declared), modules in description.modules.groups.items()
        if form.quantized
    ]
