"""The options of a conversion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quarkconv.convert.shard_size import DEFAULT_SHARD_SIZE, parse_size
from quarkconv.description.description import Description, describe
from quarkconv.description.quantized import quantized_description
from quarkconv.errors import UsageError
from quarkconv.experts.ranks import Rank, ranks_of
from quarkconv.files.base import Files
from quarkconv.progress import Progress
from quarkconv.scheme.options import KEEP, SourceOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a conversion beside its target.

    Attributes:
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        tp, ep: number of tensor parallel or expert parallel ranks that the experts are divided among.
        quantize: ``missing`` quantizes the float modules that the config declares quantized, ``all`` every linear that
            engines run in int8, to ptpc_int8; None quantizes nothing.
        exclude: modules that stay float: names, fnmatch patterns, and regular expressions after ``re:``.
        scheme: scheme of the int8 modules where config.json does not declare one: ``ptpc_int8``.
        mtp: ``keep`` the layers of multi-token prediction as they are, ``drop`` them, or ``quantize`` their float
            linears to ptpc_int8.

    Raises:
        UsageError: a value is invalid.
    """

    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    tp: int = 1
    ep: int = 1
    quantize: str | None = None
    exclude: Iterable[str] = ()
    scheme: str | None = None
    mtp: str = KEEP

    def __post_init__(self) -> None:
        ranks_of(self.tp, self.ep)
        parse_size(self.max_shard_size)
        SourceOptions.of(self.quantize, self.exclude, self.scheme, self.mtp)

    @property
    def shard_bytes(self) -> int:
        """Largest size of a shard's data in bytes."""
        return parse_size(self.max_shard_size)

    @property
    def ranks(self) -> list[Rank]:
        """All ranks; the whole model is a single one."""
        return ranks_of(self.tp, self.ep)

    def rank(self, number: int) -> Rank:
        """One of the ranks.

        Raises:
            UsageError: the rank is out of range.
        """
        ranks = self.ranks
        if not 0 <= number < len(ranks):
            raise UsageError("The rank is out of range", expected=f"0 to {len(ranks) - 1}", found=str(number))
        return ranks[number]

    @property
    def of_source(self) -> SourceOptions:
        """Those on the source."""
        return SourceOptions.of(self.quantize, self.exclude, self.scheme, self.mtp)

    def describe(self, files: Files, progress: Progress, engine: str | None = None) -> Description:
        """A source as it is, or as it will be with some of its float modules quantized.

        Args:
            files: the source.
            progress: receives how far reading the headers has come.
            engine: the only engine that the output is for; None for several.
        """
        options = self.of_source
        description = describe(files, progress, scheme=options.scheme, mtp=options.mtp)
        return quantized_description(description, options, engine) if options.quantizes else description
