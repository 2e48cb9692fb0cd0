"""Bytes by dtype and by kind: every byte is counted once, and under the right name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import EXPORTS, FIXTURES
from writing_support import make_checkpoint

from quarkconv.description import describe
from quarkconv.inspection.sizes import bytes_by_dtype, bytes_by_kind
from quarkconv.scheme.stored import nbytes


@pytest.mark.parametrize("name", sorted(FIXTURES | EXPORTS))
def test_every_tensor_is_counted_once(name: str, checkpoints: Callable[[str], Path]) -> None:
    description = describe(checkpoints(name))
    by_dtype: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    for tensor, kind in description.checkpoint.kinds.items():
        by_dtype[kind[0]] += nbytes(kind)
        module = tensor.removesuffix(".weight")
        what = "everything else"
        if tensor.endswith(("_scale", "_zero_point")):
            what = "scales and zero points"
        elif module in description.topology.members:
            what = "routed experts"
        elif kind[0] == "I8" and module in description.stored.linears:
            what = "other int8 linears"
        by_kind[what] += nbytes(kind)
    assert dict(bytes_by_dtype(description)) == by_dtype
    assert dict(bytes_by_kind(description)) == by_kind


def test_the_largest_comes_first(tmp_path: Path) -> None:
    sizes = bytes_by_kind(describe(make_checkpoint(tmp_path / "model")))
    assert [size for _, size in sizes] == sorted((size for _, size in sizes), reverse=True)
    assert sizes[0][0] == "routed experts"
