"""The conditions of a plan on the source's data, checked before anything is written."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final

from quarkconv.errors import UnsupportedError
from quarkconv.plan.pieces import Check, RowScales
from quarkconv.plan.plan import Plan
from quarkconv.write.source import Reader, Source

_CHECKS_AT_ONCE: Final = 256


def run_checks(checks: tuple[Check, ...], sources: Source, jobs: int = 1) -> None:
    """Check the conditions of a plan on the source's data, before anything is written.

    Raises:
        UnsupportedError: one does not hold.
    """
    stop = threading.Event()

    def check(batch: list[Check]) -> None:
        with sources.ahead(source for item in batch for source in item.reads()) as reader:
            for item in batch:
                if stop.is_set():
                    return
                _check(item, reader)

    remaining = iter(checks)
    batches = iter(lambda: list(islice(remaining, _CHECKS_AT_ONCE)), [])
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="quarkconv-check") as pool:
        try:
            for _ in pool.map(check, batches):
                pass
        finally:  # the others stop at their next check
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_float_rows(plans: Iterable[Plan], sources: Source, jobs: int) -> None:
    """Check the weights that will be quantized, before anything is written or deleted.

    Rows that several plans have in common are read once.

    Raises:
        UnsupportedError: a row is all zero, or is not finite.
    """
    tensors = (tensor for plan in plans for shard in plan.shards for tensor in shard.tensors)
    pieces = {piece for tensor in tensors for piece in tensor.pieces if isinstance(piece, RowScales)}
    if not pieces:
        return
    from quarkconv.write.quantizing import check_rows

    def check(piece: RowScales) -> None:
        with sources.ahead(piece.reads()) as reader:
            check_rows(piece, reader)

    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="quarkconv-rows") as pool:
        try:
            for _ in pool.map(check, sorted(pieces, key=_position)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _position(piece: RowScales) -> tuple[str, int]:
    return piece.source.file, piece.source.start


def _check(check: Check, reader: Reader) -> None:
    first = reader.read(check.first)
    second = None if check.second is None else reader.read(check.second)
    if check.kind == "zero" and first.strip(b"\0"):
        raise UnsupportedError(
            "A zero point is not zero: the weights are not quantized symmetrically",
            tensor=check.first.tensor,
            file=check.first.file,
            expected="zeros",
            found=f"{len(first) - first.count(0)} nonzero bytes",
            hint="quantize the model again with symmetric weights",
        )
    if check.kind == "repeats" and second is not None and first != second * (len(first) // len(second)):
        raise UnsupportedError(
            "The rows of a weight have different scales; with static activations, Quark has one scale per weight",
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
