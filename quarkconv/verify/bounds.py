"""Bounds on the relative errors of the INT8 forward: the Frobenius norm of a difference over that of the reference.

Neither bound is one number for all models. Both follow from the layer's inputs, weights and sizes, so they hold for
every hidden size H, intermediate size I, number of experts per token k and number of tokens M.

**Against the exact reference.** Both sides round at the same places. They differ only where the error of float32
decides a rounding. The reference knows its values before each rounding, and the error that float32 may have there.
Where that error reaches the middle between two neighbours, the element gets a tolerance, which is carried through to
the output:

- An element of h, the input of down: another code, and so a step times a column of w2. The largest element of its row:
  another scale, under which all I codes of the row are rounded again. That moves the row's output by about 1 %, which a
  small layer notices: of M k pairs of token and expert, one such row is 1 % / sqrt(M k) of the output, 6e-4 for 64
  tokens of 4 experts, 1e-2 for a single pair.
- An element of an expert's output, or of the sum over experts: one step of the dtype, at most 2^-7 of a bfloat16.

Float32 decides about one element in 2^12: its error is some 2^-20 of a value, and bfloat16 values are 2^-8 apart. The
bound is the norm of the tolerances over that of the output, and :data:`EXACT_BASE` for what they leave out. Without
such an element it is the base. To leave out a rounding, or to round elsewhere, costs 2^-9 and more.

**Against the dequantized reference.** The difference is the noise of 8-bit activations: each code is off by up to half
a step, independently and evenly. The reference simulates that noise on x and on h, :data:`NOISE_SAMPLES` times. How it
reaches the output depends on H, I, k, the largest value of each row, the spread of the weights, and on gate and up
seeing the same error; the simulation has all of that, and its mean square is n_t for token t.

One draw of the noise differs from its mean. At worst a token's whole noise is one Gaussian number, as where a single
element of h makes the output. Then the square of the difference is the sum of n_t Z_t^2, and (Laurent and Massart,
Adaptive estimation of a quadratic functional, 2000, lemma 1)

    P(sum n_t Z_t^2 > sum n_t + 2 sqrt(x) |n|_2 + 2 x |n|_max) <= exp(-x).

The bound takes x = :data:`TAIL`. It is 1.3 times the noise for 1,024 tokens of equal noise, 1.8 times for 32, and 6.4
times where one token has it all. :data:`ROUNDING` is added for the roundings to bfloat16.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from quarkconv.verify.reference import References

EXACT_BASE: Final = 2.0**-11
"""A quarter of what leaving out a rounding to bfloat16 costs (2^-9)."""
NOISE_SAMPLES: Final = 8
TAIL: Final = 16.0
"""Once in exp(16), 9 million, draws the noise exceeds the bound."""
ROUNDING: Final = 2.0**-8
"""The largest relative error of rounding to bfloat16."""


def exact_bound(references: References) -> float:
    """Bound on the relative error against the exact reference."""
    signal = references.exact.norm().item()
    return math.hypot(EXACT_BASE, references.tolerance.norm().item() / signal) if signal else EXACT_BASE


def noise_bound(references: References, rows: Tensor) -> float:
    """Bound on the relative error against the dequantized reference.

    Args:
        references: of all tokens.
        rows: the tokens that are compared, bool [M].
    """
    expected = references.dequantized[rows]
    signal = expected.norm().item()
    if not signal:
        return ROUNDING
    samples = torch.stack([sample[rows] - expected for sample in references.noisy])
    noise = samples.square().sum(dim=-1).mean(dim=0)  # of each token
    largest = noise.sum() + 2 * math.sqrt(TAIL) * noise.norm() + 2 * TAIL * noise.max()
    return math.hypot(math.sqrt(largest.item()) / signal, ROUNDING)
