"""What only the data tells: are scales positive numbers, are zero points zero. Weights are never read."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack

from quarkconv.description import Description
from quarkconv.findings import Finding, finding
from quarkconv.headers.safetensors import TensorRef
from quarkconv.headers.widen import widen_bf16, widen_f16
from quarkconv.scheme.stored import SCALE_DTYPES


def deep_findings(description: Description) -> Iterator[Finding]:
    """Read every scale and zero point of a checkpoint.

    Raises:
        SourceError: a file cannot be read.
    """
    shards = {shard.file for shard in description.checkpoint.shards if not shard.truncated}
    bad_scales: list[tuple[str, str]] = []
    nonzero: list[str] = []
    refs = description.checkpoint.refs()
    with ExitStack() as stack:
        files = {}
        for name in sorted(refs, key=lambda name: (refs[name].file, refs[name].start)):
            ref = refs[name]
            is_scale = name.endswith("_scale") and ref.dtype in SCALE_DTYPES
            is_zero_point = name.endswith("_zero_point")
            if ref.file not in shards or not (is_scale or is_zero_point):
                continue
            if ref.file not in files:
                files[ref.file] = stack.enter_context(open(description.checkpoint.root / ref.file, "rb"))
            data = os.pread(files[ref.file].fileno(), ref.nbytes, ref.start)
            if is_zero_point and any(data):
                nonzero.append(name)
            elif is_scale and (problem := _scale_problem(ref, data)):
                bad_scales.append((name, problem))
    if bad_scales:
        name, problem = bad_scales[0]
        yield finding(
            "scale-invalid", name,
            f"{len(bad_scales)} scale tensor(s) are not finite and positive: {name} has {problem}",
            hint="quantize the model again; its outputs would be NaN or zero", count=len(bad_scales),
        )  # fmt: skip
    if nonzero:
        yield finding(
            "zero-point-nonzero", nonzero[0], f"{len(nonzero)} zero point(s) are not zero, first {nonzero[0]}",
            hint="quantize the model again with symmetric weights", count=len(nonzero),
        )  # fmt: skip


def _scale_problem(ref: TensorRef, data: bytes) -> str | None:
    """What is wrong with the values of a scale, if anything."""
    widened = {"BF16": widen_bf16, "F16": widen_f16}.get(ref.dtype, bytes)(data)
    values = array("f", widened)
    if not all(map(math.isfinite, values)):
        return "NaN or infinite values"
    if min(values, default=1.0) <= 0:
        return f"the value {min(values)}"
    return None
