"""Conversion as a ``Converter`` of compressed-tensors, for pipelines that are built on its ``convert_checkpoint``.

    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from quarkconv.integrations.compressed_tensors import QuarkInt8Converter

    convert_checkpoint(model, out, QuarkInt8Converter(model), device="cpu")

The tensors equal those of ``quarkconv convert --to compressed-tensors`` (or ``fused-int8``, or ``bf16``), because both
carry out the same plan. Here they pass through memory, one file at a time, without manifest, checksums and resuming.
Source: ``compressed_tensors.entrypoints.convert``, 0.20; the package is not needed to import this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from quarkconv.convert.planner import make_plan
from quarkconv.description.description import describe
from quarkconv.errors import SourceError, UnsupportedError, UsageError
from quarkconv.experts.config import QUANTIZATION_KEY
from quarkconv.headers.safetensors import TensorRef
from quarkconv.hub.locate import locate
from quarkconv.plan.pieces import (
    Check,
    CodeColumns,
    Codes,
    Columns,
    Copy,
    OutputTensor,
    Piece,
    Rows,
    RowScales,
    Weights,
    Zeros,
)
from quarkconv.plan.plan import Plan
from quarkconv.targets import get_target
from quarkconv.text import alternatives
from quarkconv.write.checked_scales import is_scale

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig

TARGETS: Final = ("compressed-tensors", "fused-int8", "bf16")
"""The targets of a Converter: formats of compressed-tensors, and dequantized."""

_NO_LIMIT: Final = 2**62


class QuarkInt8Converter:
    """Converts one Quark INT8 checkpoint.

    Args:
        model: directory or Hub repo id of the checkpoint that the pipeline converts.
        target: ``compressed-tensors``, ``fused-int8`` or ``bf16``.

    Raises:
        UsageError: another target.
        SourceError, UnsupportedError: as :func:`quarkconv.plan_conversion`.
    """

    def __init__(self, model: str | Path, target: str = "compressed-tensors") -> None:
        if target not in TARGETS:
            raise UsageError("A Converter does not support this target", expected=alternatives(TARGETS), found=target)
        description = describe(locate(model, cache=True).files)
        self.plan: Plan = make_plan(description, get_target(target), _NO_LIMIT)
        self._refs = description.checkpoint.refs()
        self._groups = _groups(self.plan, self._refs)
        self._primary = _primaries(self._groups, self._refs)
        self._outputs: dict[str, list[OutputTensor]] = {}
        for shard in self.plan.shards:
            for tensor in shard.tensors:
                self._outputs.setdefault(self._of(_sources(tensor)), []).append(tensor)
        self._checks: dict[str, list[Check]] = {}
        for check in self.plan.checks:
            self._checks.setdefault(self._of([check.first.tensor]), []).append(check)

    def get_dependencies(self, weight_name: str) -> set[str]:
        """The other tensors of a group that is converted together; empty for all but one tensor of each group."""
        if self._primary.get(weight_name) != weight_name:
            return set()
        return self._groups[weight_name] - {weight_name}

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert whole groups of tensors.

        Raises:
            SourceError: a tensor is not one of the checkpoint, or one that it needs is missing; a scale, a router or a
                bias of experts is NaN or infinite.
            UnsupportedError: a zero point is not zero, or two scales that must be equal are not.
        """
        self._check_complete(tensors)
        converted: dict[str, Tensor] = {}
        for primary in dict.fromkeys(self._primary[name] for name in tensors):
            for check in self._checks.get(primary, ()):
                _check(check, tensors, self._refs)
            for output in self._outputs.get(primary, ()):
                parts = [_piece(piece, tensors, self._refs) for piece in output.pieces]
                whole = parts[0] if len(parts) == 1 else torch.cat(parts)
                if is_scale(output):
                    _check_finite(output.name, whole)
                converted[output.name] = whole.reshape(output.shape)
        return converted

    def validate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`process`, for tensors without data (on the device ``meta``)."""
        return self.process(tensors)

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:  # noqa: ARG002
        """The quantization_config of the output; None if it is dequantized."""
        from compressed_tensors.quantization import QuantizationConfig

        written = self.plan.config.get(QUANTIZATION_KEY)
        return None if written is None else QuantizationConfig.model_validate(written)

    def update_model_config(self, model_config: dict[str, Any]) -> dict[str, Any]:
        """The rest of config.json, without an earlier quantization in its text part."""
        written = self.plan.config
        changed = {key: value for key, value in written.items() if key != QUANTIZATION_KEY}
        return {**model_config, **changed}

    def _of(self, names: Iterable[str]) -> str:
        return self._primary[next(iter(names))]

    def _check_complete(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._primary or tuple(tensor.shape) != self._refs[name].shape:
                expected = str(list(self._refs[name].shape)) if name in self._refs else "a tensor of the checkpoint"
                raise SourceError(
                    "The converter was created for another checkpoint",
                    code="source-changed",
                    tensor=name,
                    expected=expected,
                    found=str(list(tensor.shape)),
                    hint="create a converter for each checkpoint",
                )
        for primary in {self._primary[name] for name in tensors}:
            missing = {name for name in self._groups[primary] if name not in tensors}
            if missing:
                raise SourceError(
                    "Tensors that must be converted together came separately",
                    code="expert-missing",
                    tensor=next(name for name in tensors if self._primary[name] == primary),
                    expected=f"{min(missing)} with it",
                    hint="also load the tensors that get_dependencies names",
                )


def _sources(output: OutputTensor) -> list[str]:
    return [source.tensor for piece in output.pieces for source in piece.reads()]


def _groups(plan: Plan, refs: Mapping[str, TensorRef]) -> dict[str, set[str]]:
    """Source tensor -> the group of tensors that it is converted with, including itself."""
    groups = {name: {name} for name in refs}

    def join(names: Iterable[str]) -> None:
        found = {id(groups[name]): groups[name] for name in names}
        largest = max(found.values(), key=len)
        for group in found.values():
            if group is not largest:
                largest |= group
                groups.update(dict.fromkeys(group, largest))

    for shard in plan.shards:
        for tensor in shard.tensors:
            join(_sources(tensor))
    for check in plan.checks:
        join([source.tensor for source in check.reads()])
        module = check.first.tensor.removesuffix("_zero_point").removesuffix("_offset")
        join([check.first.tensor, *(name for name in (module, f"{module}_scale") if name in refs)])
    return groups


def _primaries(groups: Mapping[str, set[str]], refs: Mapping[str, TensorRef]) -> dict[str, str]:
    """Source tensor -> the tensor of its group that the pipeline starts from.

    The pipeline requires one in every file, so each group takes it from the file that has the fewest.
    """
    primary: dict[str, str] = {}
    started: Counter[str] = Counter()
    for name in sorted(groups, key=lambda name: (len(groups[name]), name)):
        if name not in primary:
            group = sorted(groups[name])
            chosen = min(group, key=lambda member: started[refs[member].file])
            started[refs[chosen].file] += 1
            primary.update(dict.fromkeys(group, chosen))
    return primary


def _piece(piece: Piece, tensors: Mapping[str, Tensor], refs: Mapping[str, TensorRef]) -> Tensor:
    """The elements of a piece, flat."""
    name, _, start, nbytes = piece.source
    tensor, ref = tensors[name].reshape(-1), refs[name]
    size = ref.nbytes // tensor.numel() if tensor.numel() else 1
    first = (start - ref.start) // size
    part = tensor[first : first + nbytes // size]
    match piece:
        case Copy():
            return part
        case Rows(_, widen, repeat):
            return (part.float() if widen else part).repeat(repeat)
        case Weights(_, scale_piece):
            scale = _piece(scale_piece, tensors, refs)
            return (part.reshape(len(scale), -1).float() * scale.unsqueeze(1)).bfloat16().reshape(-1)
        case Columns(_, run, stride):
            return part.as_strided((piece.rows, run), (stride, 1), part.storage_offset()).reshape(-1)
        case Codes() | CodeColumns() | RowScales():
            raise NotImplementedError("a Converter does not quantize")
        case Zeros(_, length):
            return torch.zeros(length // 4, device=tensor.device)


def _check(check: Check, tensors: Mapping[str, Tensor], refs: Mapping[str, TensorRef]) -> None:
    first = _piece(check.first, tensors, refs)
    if first.is_meta:
        return
    if check.kind == "finite":
        _check_finite(check.first.tensor, first)
        return
    if check.kind == "zero":
        held, expected = not first.any(), "zeros"
    else:
        assert check.second is not None
        second = _piece(check.second, tensors, refs)
        held, expected = bool((first == second).all()), f"the value of {check.second.tensor}"
    if not held:
        raise UnsupportedError(
            "The target cannot represent this tensor",
            tensor=check.first.tensor,
            expected=expected,
            found="other values",
            hint="run `quarkconv convert` on the checkpoint for the reason",
        )


def _check_finite(name: str, values: Tensor) -> None:
    if not values.is_meta and not bool(values.isfinite().all()):
        raise SourceError(
            "A scale, a router or a bias of experts is NaN or infinite",
            code="scale-invalid",
            tensor=name,
            expected="finite values",
            found="NaN or infinite values",
            hint="run `quarkconv inspect --deep` on the checkpoint",
        )
