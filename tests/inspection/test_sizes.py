"""Bytes by dtype and by kind: every byte is counted once, and under the right name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.exports import EXPORTS, FIXTURES

from quarkconv.description.description import describe
from quarkconv.inspection.sizes import bytes_by_dtype, bytes_by_use


@pytest.mark.parametrize("name", sorted(FIXTURES | EXPORTS))
def test_every_tensor_is_counted_once(name: str, checkpoints: Callable[[str], Path]) -> None:
    description = describe(checkpoints(name))
    by_dtype: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    for tensor, kind in description.checkpoint.types.items():
        by_dtype[kind.dtype] += kind.nbytes
        module = tensor.removesuffix(".weight")
        what = "everything else"
        if tensor.endswith(("_scale", "_zero_point")):
            what = "scales and zero points"
        elif module in description.topology.members:
            what = "routed experts"
        elif kind.dtype == "I8" and module in description.stored.linears:
            what = "other int8 linears"
        by_kind[what] += kind.nbytes
    assert dict(bytes_by_dtype(description)) == by_dtype
    assert dict(bytes_by_use(description)) == by_kind


def test_the_largest_comes_first(tmp_path: Path) -> None:
    sizes = bytes_by_use(describe(make_checkpoint(tmp_path / "model")))
    assert [size for _, size in sizes] == sorted((size for _, size in sizes), reverse=True)
    assert sizes[0][0] == "routed experts"
