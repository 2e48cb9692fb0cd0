"""``inspect --deep``: scales must be finite and positive, zero points zero. Weights are never read.

Scales of weights may be negative: auto-round chooses the sign with which the largest magnitude of a row becomes -128
(``data_type/int.py``, ``quant_tensor_sym``), and code * scale is the weight nevertheless.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from quarkconv.defects import unreadable_tensor
from quarkconv.description.description import Description
from quarkconv.dtypes import widen_bf16, widen_f16
from quarkconv.errors import COPY_AGAIN, SourceError
from quarkconv.files.base import Files, Range
from quarkconv.findings import Finding, FindingsAbout, Severity
from quarkconv.headers.safetensors import TensorRef
from quarkconv.progress import Progress
from quarkconv.scheme.companions import describes_activations
from quarkconv.scheme.form import SCALE_DTYPES
from quarkconv.scheme.scale_values import are_finite, are_zeros
from quarkconv.text import plural

_BLOCK: Final = 2**20
"""Bytes read at a time, a multiple of every element size. A tensor named as a scale may be as large as a weight."""
_LEAST_NORMAL: Final = 2.0**-126


def deep_findings(description: Description, progress: Progress) -> Iterator[Finding]:
    """Read every scale and zero point, and report wrong ones.

    Args:
        description: the checkpoint.
        progress: counts the bytes that were read.

    Raises:
        SourceError: a file cannot be read.
    """
    shards = {shard.file for shard in description.checkpoint.shards if not shard.truncated}
    refs = description.checkpoint.refs()
    ranges = [
        (name, block)
        for name in sorted(refs, key=lambda name: (refs[name].file, refs[name].start))
        if refs[name].file in shards and (_is_zero_point(name) or _is_scale(name, refs[name]))
        for block in _blocks(refs[name])
    ]
    progress.step("Reading scales", sum(block.end - block.start for _, block in ranges), "byte")
    defects = _Defects()
    for name, data in _read(description.checkpoint.store, ranges):
        progress.advance(len(data))
        defects.add(name, refs[name].dtype, data)
    yield from defects.findings()


class _Defects:
    """The scales and zero points that are wrong, each once: a tensor may have several blocks.

    Dicts of None are sets that keep the order.
    """

    def __init__(self) -> None:
        self._invalid: dict[str, str] = {}  # scale -> the problem of its first block that has one
        self._subnormal: dict[str, None] = {}
        self._negative: dict[str, None] = {}
        self._zero: dict[str, None] = {}
        self._nonzero: dict[str, None] = {}

    def add(self, name: str, dtype: str, data: bytes) -> None:
        """Look at a block of a tensor."""
        if _is_zero_point(name):
            if not are_zeros(data, dtype):
                self._nonzero[name] = None
            return
        problem, least = _scale_problem(dtype, data)
        if problem is None and least < 0 and _is_of_weights(name):
            self._negative[name] = None
        elif problem is None and least == 0 and _is_of_weights(name):
            self._zero[name] = None
        elif problem or least <= 0:
            self._invalid.setdefault(name, problem or f"the value {least}")
        elif least < _LEAST_NORMAL:
            self._subnormal[name] = None

    def findings(self) -> Iterator[Finding]:
        """A finding for each kind of defect."""
        first_problem = next(iter(self._invalid.values()), "")
        yield from FindingsAbout(
            "scale-invalid",
            list(self._invalid),
            f"{plural(len(self._invalid), 'scale')} not finite or not positive; the first has {first_problem}",
            hint="quantize the model again; its outputs would be NaN or wrong",
        )
        yield from FindingsAbout(
            "scale-invalid",
            list(self._zero),
            f"{plural(len(self._zero), 'weight scale')} of 0, which make their rows 0 whatever the codes",
            hint="harmless if their codes are 0 too, which verify checks; otherwise quantize the model again",
            severity=Severity.WARNING,
        )
        yield from FindingsAbout(
            "scale-negative",
            list(self._negative),
            f"{plural(len(self._negative), 'scale')} with negative values, as auto-round writes them",
            hint="no action needed for engines that multiply by scales, as vLLM and SGLang do",
        )
        yield from FindingsAbout(
            "scale-subnormal",
            list(self._subnormal),
            f"{plural(len(self._subnormal), 'scale')} below 2^-126, which GPUs may flush to zero",
            hint="quantize the model again with a lower bound on scales",
        )
        yield from FindingsAbout(
            "zero-point-nonzero",
            list(self._nonzero),
            f"{plural(len(self._nonzero), 'tensor')} of zero points that are not zero",
            hint="quantize the model again with symmetric weights",
        )


def _is_zero_point(name: str) -> bool:
    return name.endswith(("_zero_point", ".weight_offset"))


def _is_scale(name: str, ref: TensorRef) -> bool:
    return name.endswith("_scale") and ref.dtype in SCALE_DTYPES


def _is_of_weights(name: str) -> bool:
    """Whether a scale is that of a weight; fused experts have ``gate_up_proj_scale``."""
    return not describes_activations(name)


def _blocks(ref: TensorRef) -> Iterator[Range]:
    for start in range(ref.start, ref.end, _BLOCK):
        yield Range(ref.file, start, min(start + _BLOCK, ref.end))


def _read(store: Files, ranges: list[tuple[str, Range]]) -> Iterator[tuple[str, bytes]]:
    """Each range's tensor and bytes."""
    data = store.read_many(block for _, block in ranges)
    for name, block in ranges:
        try:
            found = next(data)
        except OSError as error:
            hint = "check the disk, then run the command again"
            raise unreadable_tensor(block.file, name, error.strerror, hint=hint) from error
        if len(found) < block.end - block.start:
            raise SourceError(
                "The file ended while it was read",
                code="shard-truncated",
                file=block.file,
                tensor=name,
                expected=f"{block.end - block.start} bytes",
                found=f"{len(found)} bytes",
                hint=COPY_AGAIN,
            )
        yield name, found


def _scale_problem(dtype: str, data: bytes) -> tuple[str | None, float]:
    """The defect of the values of a scale, or None; and its smallest value, 0 where one is 0, or a negative one."""
    widened = {"BF16": widen_bf16, "F16": widen_f16}.get(dtype, bytes)(data)
    values = array("f", widened)
    if not are_finite(widened):
        return "NaN or infinite values", 0.0
    if 0.0 in values:
        return None, 0.0
    return None, min(values, default=1.0)
