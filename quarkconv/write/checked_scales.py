"""Scales, checked while they are written: ``verify`` would reject what is refused here. No scale is read twice for it.

A scale of 0 is harmless where all codes of its rows are 0. Few scales are 0, so only their codes are read once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from quarkconv.errors import SourceError
from quarkconv.plan.pieces import Columns, Copy, OutputShard, OutputTensor, Rows
from quarkconv.scheme.scale_values import are_finite, are_positive
from quarkconv.write.source import Source, read

_SUFFIX: Final = "_scale"
_OF_INPUTS: Final = "input_scale"
_BLOCK_BYTES: Final = 2**20


class ZeroScales(NamedTuple):
    """Scales of 0 in a tensor of the output: the number of their piece, and their positions in it."""

    tensor: OutputTensor
    number: int
    positions: Sequence[int]

    @property
    def scale(self) -> Copy | Rows:
        """The piece."""
        piece = self.tensor.pieces[self.number]
        assert isinstance(piece, Copy | Rows)
        return piece


def is_scale(tensor: OutputTensor) -> bool:
    """Whether a tensor of the output is a scale."""
    return tensor.dtype == "F32" and tensor.name.endswith(_SUFFIX)


def check_scale(source: Copy, values: bytes | bytearray) -> None:
    """Refuse a value that no scale may have. A scale of weights may be negative, as auto-round writes them.

    Args:
        source: where the scale is from.
        values: its elements as F32, or some of them.

    Raises:
        SourceError: a value is not finite, or a static scale of activations is not positive.
    """
    if not are_finite(values):
        raise _invalid("A scale is NaN or infinite", source, expected="finite values", found="NaN or infinite values")
    if source.tensor.endswith(_OF_INPUTS) and not are_positive(values):
        message = "A scale of activations is zero or negative"
        raise _invalid(message, source, expected="positive values", found="a value that is not positive")


class CodesOfScales:
    """The codes of an output by the scales that they belong to.

    Args:
        shards: all shards of the plan.
    """

    def __init__(self, shards: Iterable[OutputShard]) -> None:
        self._shards = shards

    @cached_property
    def _weights(self) -> dict[str, OutputTensor]:
        tensors = (tensor for shard in self._shards for tensor in shard.tensors)
        return {tensor.name: tensor for tensor in tensors if tensor.dtype == "I8"}

    def check_zeros(self, found: ZeroScales, sources: Source) -> None:
        """Refuse scales of 0 whose codes are not all 0.

        Raises:
            SourceError: there is such a scale, or reading failed.
        """
        rows = list(self._rows(found))
        with sources.ahead(rows) as reader:
            for row in rows:
                for start in range(0, row.nbytes, _BLOCK_BYTES):
                    if any(read(reader, row, start, min(_BLOCK_BYTES, row.nbytes - start))):
                        raise zero_scale(found.scale.source, row)

    def _rows(self, found: ZeroScales) -> Iterator[Copy]:
        """The codes of each zero; nothing where the weight is not of int8, and so no row is known."""
        weight = self._weights.get(found.tensor.name.removesuffix(_SUFFIX))
        codes = None if weight is None else weight.pieces[found.number]
        if not isinstance(codes, Copy | Columns):
            return
        scale = found.scale
        count = scale.output_nbytes // 4 // (scale.repeat if isinstance(scale, Rows) else 1)
        if isinstance(codes, Columns) and count == codes.rows:
            length, stride = codes.run, codes.stride
        else:
            length = stride = codes.source.nbytes // count
        for position in found.positions:
            yield codes.source._replace(start=codes.source.start + position * stride, nbytes=length)


def zero_scale(scale: Copy, codes: Copy) -> SourceError:
    """The error of a scale of 0 whose codes are not all 0."""
    return _invalid(
        "A scale is zero, but the codes of its row are not",
        scale,
        expected="codes of zero, or a nonzero scale",
        found=f"codes of {codes.tensor} that are not zero",
    )


def _invalid(message: str, source: Copy, *, expected: str, found: str) -> SourceError:
    return SourceError(
        message,
        code="scale-invalid",
        file=source.file,
        tensor=source.tensor,
        expected=expected,
        found=found,
        hint="download or copy the file again; if the scale is unchanged, quantize the model again",
    )
