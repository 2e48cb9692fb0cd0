"""Dividing the work of a plan among workers that do not talk to each other.

Every worker has the plan, and takes the same decision: shards are dealt by size, largest first, each to the share with
the fewest bytes so far; checks are dealt in turn. A share therefore holds at most one shard more than its fair part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any, Final

from quarkconv.errors import UsageError
from quarkconv.plan.pieces import Check, OutputShard
from quarkconv.plan.plan import Plan

MAX_SHARES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Share:
    """One share of the work of a plan.

    Attributes:
        number: number of the share, from 1.
        count: number of shares.

    Raises:
        UsageError: a number is out of range.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MAX_SHARES:
            raise _invalid(str(self))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def work(self, plan: Plan) -> ShareWork:
        """The work of the share."""
        return ShareWork(self, self.shards(plan.shards), self.checks(plan.checks))

    def shards(self, shards: tuple[OutputShard, ...]) -> tuple[OutputShard, ...]:
        """The shards of the share, in the order of the plan."""
        taken = self.deal({shard.file: shard.nbytes for shard in shards})
        return tuple(shard for shard in shards if shard.file in taken)

    def deal(self, sizes: Mapping[str, int]) -> set[str]:
        """Those of some things that the share gets: largest first, each to the share with the fewest bytes so far.

        Args:
            sizes: name -> bytes.
        """
        loads = [(0, number) for number in range(1, self.count + 1)]
        heapify(loads)
        taken: set[str] = set()
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            nbytes, number = loads[0]
            heapreplace(loads, (nbytes + size, number))
            if number == self.number:
                taken.add(name)
        return taken

    def checks(self, checks: tuple[Check, ...]) -> tuple[Check, ...]:
        """The checks of the share."""
        return checks[self.number - 1 :: self.count]


ALL: Final = Share(1, 1)
"""The whole plan as one share."""


@dataclass(frozen=True, slots=True)
class ShareWork:
    """The checks and shards of one share of a plan."""

    share: Share
    shards: tuple[OutputShard, ...]
    checks: tuple[Check, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the shards."""
        return sum(shard.nbytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """The share as ``convert --part --json`` prints it."""
        number, count = self.share.number, self.share.count
        return {"part": {"number": number, "count": count, "shards": len(self.shards), "bytes": self.nbytes}}


def parse_share(text: str) -> Share:
    """A share from ``3/8``.

    Raises:
        UsageError: ``text`` has another form, or a number is out of range.
    """
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip(), re.ASCII)
    if match is None:
        raise _invalid(text)
    return Share(int(match[1]), int(match[2]))


def _invalid(text: str) -> UsageError:
    expected = f"K/N with K from 1 to N, and N at most {MAX_SHARES}"
    return UsageError("Invalid --part", expected=expected, found=repr(text)[:40], hint="such as --part 1/8")
