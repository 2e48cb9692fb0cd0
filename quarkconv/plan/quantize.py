"""From copies of int8 weights and scales that are not stored to the computation that gives them.

A target plans with a :class:`quarkconv.description.quantized.QuantizedCheckpoint` as with any other. Its pieces of
tensors that are not stored are rows of codes, columns of codes, or scales of rows. All become pieces of the float
weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.errors import UnsupportedError
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.pieces import CodeColumns, Codes, Columns, Copy, OutputTensor, Piece, RowScales, Zeros

_F32 = 4


def computed(tensor: OutputTensor, originals: Mapping[str, TensorRef]) -> OutputTensor:
    """An output tensor with its pieces computed from float weights, where these are not stored in int8.

    Args:
        tensor: as a target planned it.
        originals: int8 weight or its scale -> the float weight.

    Raises:
        UnsupportedError: the target needs more than codes and scales.
    """
    if not any(piece.source.tensor in originals for piece in tensor.pieces):
        return tensor
    return tensor._replace(pieces=tuple(_computed(piece, originals) for piece in tensor.pieces))


def _computed(piece: Piece, originals: Mapping[str, TensorRef]) -> Piece:
    name = piece.source.tensor
    original = originals.get(name)
    if original is None:
        return piece
    columns = original.shape[-1]
    row_nbytes = columns * DTYPE_BITS[original.dtype] // 8

    def rows(first: int, count: int) -> Copy:
        start = original.start + first * row_nbytes
        return Copy(name.removesuffix("_scale"), original.file, start, count * row_nbytes)

    match piece:
        case Copy():
            is_scale = name.endswith("_scale")
            element = _F32 if is_scale else columns  # of a row
            source = rows(piece.start // element, piece.nbytes // element)
            return (RowScales if is_scale else Codes)(source, original.dtype, columns)
        case Columns(codes, run, _):
            row, first = divmod(codes.start, columns)
            return CodeColumns(Codes(rows(row, piece.rows), original.dtype, columns), first, run)
        case Zeros(_, nbytes):
            return Zeros(Copy(name, original.file, original.start, original.nbytes), nbytes)
    raise UnsupportedError(
        "--quantize does not support this target",
        tensor=name,
        expected="a target with int8 codes",
        hint="quantize to compressed-tensors first, then convert that",
    )
