"""Bounds on the relative errors of the INT8 forward. They follow from the very inputs, weights and roundings."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from quarkconv.verify.reference import References

EXACT_BASE: Final = 2.0**-11
NOISE_SAMPLES: Final = 4
NOISE_FACTOR: Final = 3.0
ROUNDING: Final = 2.0**-8


def exact_bound(references: References) -> float:
    """Bound on the relative error against the exact reference."""
    signal = references.exact.norm().item()
    return math.hypot(EXACT_BASE, references.tolerance.norm().item() / signal) if signal else EXACT_BASE


def noise_bound(references: References, rows: Tensor) -> float:
    """Bound on the relative error against the dequantized reference, for some rows."""
    expected = references.dequantized[rows]
    signal = expected.norm().item()
    squares = [(sample[rows] - expected).square().sum().item() for sample in references.noisy]
    noise = math.sqrt(sum(squares) / len(squares)) / signal if signal else 0.0
    return math.hypot(NOISE_FACTOR * noise, ROUNDING)
