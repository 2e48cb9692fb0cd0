"""Conversions to a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from support.progress import Stop
from support.s3 import OUT

OPTIONS: dict[str, Any] = {"max_shard_size": 40_000, "jobs": 2}


def convert(model: str | Path, out: str | Path = OUT, **options: Any) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", out, **{**OPTIONS, **options})


def prepare(model: str | Path, out: str | Path = OUT, **options: Any) -> Conversion:
    return Conversion.prepare(model, "fused-int8", out, Options(**{"max_shard_size": 40_000, **options}))


def interrupted(model: str | Path, after: int, **options: Any) -> None:
    """A conversion that fails after some blocks."""
    with pytest.raises(RuntimeError, match="stop"):
        convert(model, progress=Stop(after), **{"jobs": 1, **options})
