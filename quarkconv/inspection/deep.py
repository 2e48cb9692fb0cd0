"""What only the data tells: are scales positive numbers, are zero points zero. Weights are never read."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from quarkconv.description import Description
from quarkconv.errors import SourceError
from quarkconv.findings import Finding, finding
from quarkconv.headers.files import open_regular
from quarkconv.headers.safetensors import TensorRef
from quarkconv.headers.widen import widen_bf16, widen_f16
from quarkconv.scheme.stored import SCALE_DTYPES

_BLOCK: Final = 2**20
"""Bytes read at a time, a multiple of the size of every element: what is named a scale may be as large as a weight."""
_LEAST_NORMAL: Final = 2.0**-126


def deep_findings(description: Description) -> Iterator[Finding]:
    """Read every scale and zero point of a checkpoint.

    Raises:
        SourceError: a file cannot be read.
    """
    shards = {shard.file for shard in description.checkpoint.shards if not shard.truncated}
    bad_scales: list[tuple[str, str]] = []
    small_scales: list[str] = []
    nonzero: list[str] = []
    refs = description.checkpoint.refs()
    with ExitStack() as stack:
        files: dict[str, int] = {}
        for name in sorted(refs, key=lambda name: (refs[name].file, refs[name].start)):
            ref = refs[name]
            is_scale = name.endswith("_scale") and ref.dtype in SCALE_DTYPES
            is_zero_point = name.endswith("_zero_point")
            if ref.file not in shards or not (is_scale or is_zero_point):
                continue
            if ref.file not in files:
                files[ref.file] = _open(stack, description.checkpoint.root / ref.file)
            blocks = _blocks(files[ref.file], name, ref)
            if is_zero_point:
                if any(any(block) for block in blocks):
                    nonzero.append(name)
                continue
            for block in blocks:
                problem, least = _scale_problem(ref.dtype, block)
                if problem:
                    bad_scales.append((name, problem))
                    break
                if least < _LEAST_NORMAL and small_scales[-1:] != [name]:
                    small_scales.append(name)
    if bad_scales:
        name, problem = bad_scales[0]
        yield finding(
            "scale-invalid", name,
            f"{len(bad_scales)} scale tensor(s) are not finite and positive: {name} has {problem}",
            hint="quantize the model again; its outputs would be NaN or zero", count=len(bad_scales),
        )  # fmt: skip
    if small_scales:
        yield finding(
            "scale-subnormal", small_scales[0],
            f"{len(small_scales)} scale tensor(s) have values below 2^-126, first {small_scales[0]}",
            hint="GPUs may take them for zero; such rows should have a scale that is small and normal",
            count=len(small_scales),
        )  # fmt: skip
    if nonzero:
        yield finding(
            "zero-point-nonzero", nonzero[0], f"{len(nonzero)} zero point(s) are not zero, first {nonzero[0]}",
            hint="quantize the model again with symmetric weights", count=len(nonzero),
        )  # fmt: skip


def _open(stack: ExitStack, path: Path) -> int:
    try:
        return stack.enter_context(open(open_regular(path), "rb")).fileno()
    except OSError as error:
        raise SourceError(
            "A file cannot be opened", code="shard-missing", file=path.name, found=error.strerror
        ) from error


def _blocks(descriptor: int, name: str, ref: TensorRef) -> Iterator[bytes]:
    """The bytes of a tensor, a block at a time."""
    for start in range(ref.start, ref.end, _BLOCK):
        wanted = min(_BLOCK, ref.end - start)
        try:
            block = os.pread(descriptor, wanted, start)
        except OSError as error:
            raise SourceError(
                "A tensor cannot be read", code="shard-truncated", file=ref.file, tensor=name, found=error.strerror,
                hint="check the disk, then give the command again",
            ) from error  # fmt: skip
        if len(block) < wanted:
            raise SourceError(
                "The file ended while it was read", code="shard-truncated", file=ref.file, tensor=name,
                expected=f"{wanted} bytes", found=f"{len(block)} bytes",
            )  # fmt: skip
        yield block


def _scale_problem(dtype: str, data: bytes) -> tuple[str | None, float]:
    """What is wrong with the values of a scale, if anything, and the least of them."""
    widened = {"BF16": widen_bf16, "F16": widen_f16}.get(dtype, bytes)(data)
    values = array("f", widened)
    if not all(map(math.isfinite, values)):
        return "NaN or infinite values", 0.0
    least = min(values, default=1.0)
    return (f"the value {least}" if least <= 0 else None), least
