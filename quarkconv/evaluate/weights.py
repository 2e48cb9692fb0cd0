"""A checkpoint in any layout as float tensors under the names of the unquantized model, layer by layer.

Codes become floats as the target ``bf16`` writes them: code times scale in float32, rounded once to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quarkconv.description.description import Description
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.evaluate.dequantize import dequantized, expert_floats, stacked
from quarkconv.evaluate.int8 import linear_groups
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.experts.layer import MoELayer
from quarkconv.load.arenas import Arena, Memory
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.load.layer_reads import LayerPart
from quarkconv.scheme.form import Form, fused_names, linear_names


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """An int8 linear: codes int8 [out, in], a scale for each row float32 [out], a static input scale or None."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def to(self, device: torch.device) -> Int8Weight:
        """The same on a device."""
        static = None if self.input_scale is None else self.input_scale.to(device)
        return Int8Weight(self.codes.to(device), self.scale.to(device), static)


@dataclass(slots=True)
class LayerWeights:
    """The tensors of a checkpoint for one decoder layer, or for the rest of the model.

    Attributes:
        floats: name in the unquantized model -> tensor.
        matrices: the same for int8 weights.
        linears: module of the transformers model -> names of its int8 weights; more than one where it joins linears.
        experts: module of the transformers model -> the MoE layer and its int8 experts.
        classes: that module, whose flags say how it keeps experts; None where it holds them one by one.
        divided: modules of ``experts`` that stay where they were read, and run in groups.
        resting: names of ``floats`` that stay where they were read.
    """

    floats: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Int8Weight] = field(default_factory=dict)
    linears: dict[str, list[str]] = field(default_factory=dict)
    experts: dict[str, tuple[MoELayer, FusedExperts]] = field(default_factory=dict)
    classes: dict[str, nn.Module | None] = field(default_factory=dict)
    divided: set[str] = field(default_factory=set)
    resting: frozenset[str] = frozenset()

    def on(self, device: torch.device) -> LayerWeights:
        """The same on a device, with codes as floats beside the codes."""
        floats = {name: tensor if name in self.resting else tensor.to(device) for name, tensor in self.floats.items()}
        matrices = {name: matrix.to(device) for name, matrix in self.matrices.items()}
        floats |= {name: dequantized(matrix.codes, matrix.scale) for name, matrix in matrices.items()}
        experts = {
            path: (layer, item if path in self.divided else item.to(device))
            for path, (layer, item) in self.experts.items()
        }
        for path, (layer, item) in experts.items():
            module = self.classes[path]
            if path in self.divided:
                continue
            if module is None:
                floats |= dict(expert_floats(layer, item))
            else:
                floats |= {f"{path}.{leaf}": tensor for leaf, tensor in stacked(item, module)}
        return LayerWeights(floats, matrices, self.linears, experts, self.classes, self.divided, self.resting)


class CheckpointWeights:
    """Reads a described checkpoint for a skeleton. A context manager: it keeps open the files that it reads from.

    Args:
        description: the checkpoint.
        skeleton: the model that its tensors go to.
        memory: takes a number of bytes, and returns memory to read them into: of the host, or of a GPU.
    """

    def __init__(self, description: Description, skeleton: Skeleton, memory: Callable[[int], Memory] = Arena) -> None:
        self.description, self.skeleton = description, skeleton
        self._memory = memory
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(READERS, thread_name_prefix="quarkconv-read"))
        self._reader = self._stack.enter_context(LayerReader(description, self._pool))
        self._names: dict[int | None, list[str]] = {}
        self._resting: dict[int | None, list[str]] = {}
        self._linears: dict[int | None, list[tuple[str, Form]]] = {}
        self._zero_points: dict[int | None, list[str]] = {}
        self._moe: dict[int | None, list[MoELayer]] = {}
        self._sort()

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def float_experts(self) -> tuple[str, ...]:
        """Modules of the routed experts that run in float, as some or all of them are stored so."""
        layers = (number for number in range(len(self.skeleton.layers)) if not self._moe.get(number))
        return tuple(path for number in layers for path in self.skeleton.expert_paths(number))

    @property
    def float_linears(self) -> tuple[str, ...]:
        """Int8 linears that run in float: the head, and modules of classes that are not linears."""
        model = self.skeleton.model
        found = []
        for number, linears in self._linears.items():
            for module, _ in linears:
                path = self.skeleton.target(f"{module}.weight").removesuffix(".weight")
                if module in self.description.topology.members or not self.skeleton.has(f"{path}.weight"):
                    continue
                here = self.skeleton.module(path)
                runs = linear_groups(here) > 0 if number is not None else here is not model.get_output_embeddings()
                if not runs:
                    found.append(path)
        return tuple(dict.fromkeys(found))

    def layer(self, number: int | None) -> LayerWeights:
        """The weights of a decoder layer; None for the rest of the model.

        Raises:
            SourceError: a file cannot be read.
            UnsupportedError: a zero point is not zero.
        """
        found = LayerWeights()
        self._require_zeros(self._zero_points.get(number, ()))
        linears = self._linears.get(number, ())
        names = [name for module, form in linears for name in _tensors_of(module, form)]
        tensors = self._reader.tensors([*self._names.get(number, ()), *names], self._memory)
        resting = self._reader.tensors(self._resting.get(number, ()))
        found.floats = {name: tensors[name] for name in self._names.get(number, ())} | resting
        found.resting = frozenset(resting)
        for module, form in linears:
            name = f"{module}.weight"
            found.matrices[name] = self._linear(module, form, tensors)
            if module not in self.description.topology.members:  # int8 experts beside float ones run in float
                path = self.skeleton.target(name).removesuffix(".weight")
                found.linears.setdefault(path, []).append(name)
        for layer in self._moe.get(number, ()):
            modules = {} if number is None else self.skeleton.experts_of(number)
            target = self.skeleton.target(_first(layer))
            path = target.rpartition(".")[0] if self.skeleton.has(target) else layer.prefix
            if path not in modules and not self.skeleton.has(target):
                if not modules:
                    self.skeleton.unmatched.append(_first(layer))
                    continue
                path = next(iter(modules))
            part = LayerPart(layer)
            memory = self._memory
            if path in self.skeleton.divided:
                found.divided.add(path)
                memory = Arena
            experts, _ = self._reader.read(part, memory(part.nbytes))
            found.experts[path] = (layer, experts)
            found.classes[path] = modules.get(path)
        return found

    def _sort(self) -> None:
        """Assign every tensor to its decoder layer."""
        stored = self.description.stored
        used: set[str] = set()
        fused: set[str] = set()
        for layer in self.description.int8_layers:
            number = self.skeleton.layer_of(self.skeleton.target(_first(layer)))
            self._moe.setdefault(number, []).append(layer)
            fused.update(layer.module_names)
        for modules, names_of in ((stored.linears, linear_names), (stored.fused, fused_names)):
            for module, form in modules.items():
                if not form.quantized:
                    continue
                names = names_of(module)
                used.update(names)
                number = self.skeleton.layer_of(self.skeleton.target(f"{module}.weight"))
                self._zero_points.setdefault(number, []).extend(names.zero_points(form))
                if module not in fused:
                    self._linears.setdefault(number, []).append((module, form))
        for name in self.description.checkpoint.types:
            if name in used:
                continue
            parameter = self.skeleton.target(name)
            if self.skeleton.has(parameter):  # MTP layers, cache scales and the like do not go into the model
                kept = self._resting if self.skeleton.divided_owner(parameter) else self._names
                kept.setdefault(self.skeleton.layer_of(parameter), []).append(name)
            else:
                self.skeleton.unmatched.append(name)

    def _require_zeros(self, names: Sequence[str]) -> None:
        for name, tensor in self._reader.tensors(names).items():
            if bool(tensor.count_nonzero()):
                raise UnsupportedError(
                    "A zero point is not zero: the quantization is not symmetric",
                    file=f"{self.description.checkpoint.root}/{self._reader.refs[name].file}",
                    tensor=name,
                    expected="zeros",
                    hint="quantize the model again with symmetric weights",
                )

    def _linear(self, module: str, form: Form, tensors: Mapping[str, Tensor]) -> Int8Weight:
        names = linear_names(module)
        codes = tensors[names.weight]
        if codes.dim() != 2:
            raise SourceError(
                "An int8 linear has more than two dimensions",
                code="weight-shape",
                file=str(self.description.checkpoint.root),
                tensor=names.weight,
                found=str(list(codes.shape)),
                hint="run `quarkconv inspect`",
            )
        scale = tensors[names.scale].float().reshape(-1)
        static = None if form.input_scale is None else tensors[names.input_scale].float().reshape(())
        return Int8Weight(codes, scale.expand(len(codes)).contiguous(), static)


def _tensors_of(module: str, form: Form) -> Iterator[str]:
    """The tensors that an int8 linear is computed with."""
    names = linear_names(module)
    yield from (names.weight, names.scale)
    if form.input_scale is not None:
        yield names.input_scale


def _first(layer: MoELayer) -> str:
    """A tensor of the first expert, under the name of the unquantized model."""
    if layer.layout == "stacked":
        return f"{layer.moe}.{layer.naming.down}.weight"
    return f"{layer.prefix}.0.{layer.naming.down}.weight"
