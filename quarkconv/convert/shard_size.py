"""Sizes of shards as people write them."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from quarkconv.errors import UsageError

DEFAULT_SHARD_SIZE: Final = "5GB"
_UNITS: Final = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_size(size: int | str) -> int:
    """A number of bytes from ``5GB``, ``512MiB`` or a plain number.

    Raises:
        UsageError: ``size`` has another form, or is more than a file can hold.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError("Invalid --max-shard-size", expected="a size such as 5GB, 512MiB or 1000000", found=repr(size))
    size_in_bytes = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size_in_bytes >= 2**63:
        raise UsageError("--max-shard-size is too large", expected="less than 2^63 bytes", found=repr(size)[:80])
    return size_in_bytes
