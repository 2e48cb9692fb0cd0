"""The conditions of a plan on the source's data, checked before anything is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from typing import Final, TypeVar

from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.plan.pieces import Check, Copy, RowScales
from quarkconv.plan.plan import Plan
from quarkconv.scheme.scale_values import are_finite, are_zeros
from quarkconv.write.source import Reader, Source, read

_CHECKS_AT_ONCE: Final = 256
_BLOCK_BYTES: Final = 2**20
_Item = TypeVar("_Item")


def run_checks(checks: tuple[Check, ...], sources: Source, jobs: int) -> None:
    """Check the conditions of a plan on the source's data, before anything is written.

    Raises:
        UnsupportedError: one does not hold.
        SourceError: a tensor that must be finite is not, or reading failed.
    """

    def check(batch: list[Check], stop: threading.Event) -> None:
        with sources.ahead(source for item in batch for source in item.reads()) as reader:
            for item in batch:
                if stop.is_set():
                    return
                _check(item, reader)

    remaining = iter(checks)
    _run(check, iter(lambda: list(islice(remaining, _CHECKS_AT_ONCE)), []), jobs)


def check_float_rows(plans: Iterable[Plan], sources: Source, jobs: int) -> None:
    """Check the weights that will be quantized, before anything is written or deleted.

    Rows that several plans have in common are read once.

    Raises:
        UnsupportedError: a row is all zero, or is not finite.
    """
    pieces = {
        piece for plan in plans for shard in plan.shards for piece in shard.pieces() if isinstance(piece, RowScales)
    }
    if not pieces:
        return
    from quarkconv.write.quantizing import check_rows

    def check(piece: RowScales, _: threading.Event) -> None:
        with sources.ahead(piece.reads()) as reader:
            check_rows(piece, reader)

    _run(check, sorted(pieces, key=lambda piece: (piece.source.file, piece.source.start)), jobs)


def _run(check: Callable[[_Item, threading.Event], None], items: Iterable[_Item], jobs: int) -> None:
    """Check items with some threads. After a failure, none begins another, and the event that each has is set."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="quarkconv-check") as pool:
        try:
            for _ in pool.map(check, items, repeat(stop)):
                pass
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _check(check: Check, reader: Reader) -> None:
    if check.kind == "finite":
        _check_finite(check.first, check.dtype, reader)
        return
    first = read(reader, check.first)
    second = None if check.second is None else read(reader, check.second)
    if check.kind == "zero" and not are_zeros(first, check.dtype):
        raise UnsupportedError(
            "A zero point is not zero: the quantization is not symmetric",
            tensor=check.first.tensor,
            file=check.first.file,
            expected="zeros",
            found=f"{len(first) - first.count(0)} nonzero bytes",
            hint="quantize the model again with symmetric weights",
        )
    if check.kind == "repeats" and second is not None and first != second * (len(first) // len(second)):
        raise UnsupportedError(
            "The rows of a weight have different scales; with static activations, Quark stores one scale per weight",
            tensor=check.first.tensor,
            file=check.first.file,
            expected="the same scale for each row",
            hint="convert to compressed-tensors or fused-int8 instead",
        )
    if check.kind == "equal" and check.second is not None and first != second:
        raise UnsupportedError(
            "Gate and up of an expert have different input scales; the fused tensor has one for both",
            tensor=check.first.tensor,
            file=check.first.file,
            expected=f"the value of {check.second.tensor}",
            hint="quantize the model again with dynamic activation scales (ptpc_int8)",
        )


def _check_finite(source: Copy, dtype: str, reader: Reader) -> None:
    block = memoryview(bytearray(min(_BLOCK_BYTES, source.nbytes)))
    for start in range(0, source.nbytes, _BLOCK_BYTES):
        data = block[: min(_BLOCK_BYTES, source.nbytes - start)]
        reader.fill(source, start, data)
        if not are_finite(bytes(data), dtype):
            raise SourceError(
                "A tensor of a router, or a bias of experts, is NaN or infinite",
                code="tensor-not-finite",
                file=source.file,
                tensor=source.tensor,
                expected="finite values",
                found="NaN or infinite values",
                hint="download or copy the file again; if the values are unchanged, export the model again",
            )
