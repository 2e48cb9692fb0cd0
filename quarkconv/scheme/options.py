"""The options of a conversion that change the modules of its source or their scheme."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple, Self, get_args

from quarkconv.errors import UsageError
from quarkconv.text import alternatives

Quantize = Literal["missing", "all"]
"""``missing``: modules that the config declares quantized. ``all``: every linear that engines run in int8."""
Mtp = Literal["keep", "drop", "quantize"]
"""The treatment of layers of multi-token prediction."""

KEEP: Final[Mtp] = "keep"
DROP: Final[Mtp] = "drop"
QUANTIZE: Final[Mtp] = "quantize"


class SourceOptions(NamedTuple):
    """The options. Create them with :meth:`of`.

    Attributes:
        quantize: which float modules are quantized to ptpc_int8; None for none.
        exclude: names, fnmatch patterns and ``re:`` patterns of modules that stay float.
        scheme: scheme of the int8 modules, where the config declares none.
        mtp: the treatment of layers of multi-token prediction.
    """

    quantize: Quantize | None = None
    exclude: tuple[str, ...] = ()
    scheme: str | None = None
    mtp: Mtp = KEEP

    @classmethod
    def of(
        cls, quantize: str | None = None, exclude: Iterable[str] = (), scheme: str | None = None, mtp: str = KEEP
    ) -> Self:
        """The options, checked.

        Raises:
            UsageError: one is invalid, or two of them exclude each other.
        """
        if quantize not in (None, *get_args(Quantize)):
            raise UsageError("Invalid --quantize", expected=alternatives(get_args(Quantize)), found=quantize)
        if mtp not in get_args(Mtp):
            raise UsageError("Invalid --mtp", expected=alternatives(get_args(Mtp)), found=mtp)
        if isinstance(exclude, str):
            raise UsageError("Invalid `exclude`", expected="a list of names and patterns", found=repr(exclude))
        patterns = tuple(dict.fromkeys(exclude))
        options = cls(quantize, patterns, scheme, mtp)  # type: ignore[arg-type]
        if patterns and not options.quantizes:
            raise UsageError(
                "--exclude has no effect without --quantize",
                expected="--quantize or --mtp quantize as well",
                hint="add one of them, or remove --exclude",
            )
        return options

    @property
    def quantizes(self) -> bool:
        """Whether float modules are quantized."""
        return self.quantize is not None or self.mtp == QUANTIZE

    def words(self) -> list[str]:
        """The options as words of a command line; those that have their default are left out."""
        words = [] if self.quantize is None else ["--quantize", self.quantize]
        for pattern in self.exclude:
            words += ["--exclude", pattern]
        words += [] if self.scheme is None else ["--scheme", self.scheme]
        return words if self.mtp == KEEP else [*words, "--mtp", self.mtp]

    def to_json(self) -> dict[str, Any]:
        """The options as JSON; :meth:`of` takes the same names."""
        return {"quantize": self.quantize, "exclude": list(self.exclude), "scheme": self.scheme, "mtp": self.mtp}


DEFAULT: Final = SourceOptions()
"""A conversion that quantizes nothing and keeps everything."""
