"""From copies of int8 weights and scales that are not stored to the computation that gives them.

A target plans with a :class:`quarkconv.description.quantized.QuantizedCheckpoint` as with any other. Its pieces of
tensors that are not stored are copies of rows of codes, or of scales of rows: both become pieces of the float weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.errors import UnsupportedError
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.pieces import Codes, Copy, OutputTensor, Piece, RowScales, Zeros

_F32 = 4


def computed(tensor: OutputTensor, originals: Mapping[str, TensorRef]) -> OutputTensor:
    """An output tensor with its pieces computed from float weights, where these are not stored in int8.

    Args:
        tensor: as a target planned it.
        originals: int8 weight or its scale -> the float weight.

    Raises:
        UnsupportedError: the target needs more than rows of codes and scales.
    """
    if not any(piece.source.tensor in originals for piece in tensor.pieces):
        return tensor
    return tensor._replace(pieces=tuple(_computed(piece, originals) for piece in tensor.pieces))


def _computed(piece: Piece, originals: Mapping[str, TensorRef]) -> Piece:
    name = piece.source.tensor
    original = originals.get(name)
    if original is None:
        return piece
    match piece:
        case Copy():
            columns, size = original.shape[-1], DTYPE_BITS[original.dtype] // 8
            is_scale = name.endswith("_scale")
            first, count = piece.start, piece.nbytes
            row, rows = (first // _F32, count // _F32) if is_scale else (first // columns, count // columns)
            weight = name.removesuffix("_scale")
            start = original.start + row * columns * size
            source = Copy(weight, original.file, start, rows * columns * size)
            return (RowScales if is_scale else Codes)(source, original.dtype, columns)
        case Zeros(_, nbytes):
            return Zeros(Copy(name, original.file, original.start, original.nbytes), nbytes)
    raise UnsupportedError(
        "This target cannot be made while modules are quantized",
        tensor=name,
        expected="a target of int8 codes, for whole models",
        hint="quantize to compressed-tensors first, then convert that",
    )
