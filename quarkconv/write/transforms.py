"""The small computations of a plan: scales to F32 rows. Exact, and without torch."""

from __future__ import annotations

from quarkconv.headers.widen import widen_bf16, widen_f16
from quarkconv.plan.pieces import Piece


def transform(piece: Piece, data: bytes) -> bytes:
    """The output bytes of a piece that is not a plain copy, from the bytes of its source range."""
    if piece.widen == "BF16":
        data = widen_bf16(data)
    elif piece.widen == "F16":
        data = widen_f16(data)
    return data * piece.repeat
