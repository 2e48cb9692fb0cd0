"""The index of a sharded checkpoint, and its contradictions with the headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from quarkconv.defects import invalid_index
from quarkconv.files.base import Files
from quarkconv.files.json_files import MAX_INDEX_BYTES, has_file, parse_json_object, read_bytes_of
from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.headers.file_names import INDEX_NAME
from quarkconv.headers.quantizer_names import names_in_index
from quarkconv.headers.safetensors import ShardHeader
from quarkconv.headers.scan import Run, runs_of, scan_index
from quarkconv.text import plural, shown

_INDEX_NAMES: Final = (INDEX_NAME, "quant_model_weights.safetensors.index.json")
"""Names under which tools write an index; the second is that of Ascend's msModelSlim."""
MAX_SHARDS: Final = 10_000
"""Most files that an index may name. The largest models have some hundreds."""
_SHARD_NAME: Final = re.compile(r"(?:(?!\.\.?/)[^/\\]+/)*[^/\\]*\.safetensors", re.DOTALL)
"""A file of the directory, or of a folder below it: the reader of shards refuses the latter as unsupported."""


class Index(NamedTuple):
    """The content of an index.

    Attributes:
        runs: its weight_map: file by file the tensors, where those of a file follow one another.
        total_size: bytes of all tensors as the index has it, of any type; None where it is absent.
    """

    runs: Sequence[Run]
    total_size: object

    @property
    def files(self) -> list[str]:
        """The files, sorted."""
        return sorted({run.file for run in self.runs})

    def by_file(self) -> dict[str, list[str]]:
        """File -> its tensors."""
        tensors: dict[str, list[str]] = {}
        for file, names in self.runs:
            tensors.setdefault(file, []).extend(names)
        return tensors

    def weight_map(self) -> dict[str, str]:
        """Tensor -> its file, in the order of the index."""
        return {name: file for file, names in self.runs for name in names}


def read_index(store: Files) -> Index | None:
    """The index of a checkpoint, if it has one.

    Raises:
        SourceError: the index cannot be read, or does not map tensors to shards of this directory.
    """
    name = next((name for name in _INDEX_NAMES if has_file(store, name)), None)
    if name is None:
        return None
    raw = read_bytes_of(store, name, code="index-invalid", limit=MAX_INDEX_BYTES)
    scanned = scan_index(raw)
    index = parse_json_object(raw if scanned is None else scanned.rest, name, code="index-invalid")
    runs = runs_of(_entries(index.get("weight_map"))) if scanned is None else scanned.runs
    if not runs:
        raise invalid_index(
            "The index lists no tensor", expected="an entry for each tensor", found="an empty weight_map"
        )
    distinct = _distinct([run.file for run in runs])
    for file in distinct:
        if not (isinstance(file, str) and _SHARD_NAME.fullmatch(file)):
            expected = "names of .safetensors files in the model's directory"
            raise invalid_index("The index lists an invalid file name", expected=expected, found=shown(file))
    if len(distinct) > MAX_SHARDS:
        expected = f"at most {MAX_SHARDS} files"
        raise invalid_index("The index lists too many files", expected=expected, found=str(len(distinct)))
    metadata = index.get("metadata")
    return Index(runs, metadata.get("total_size") if isinstance(metadata, dict) else None)


def _entries(weight_map: object) -> Iterable[tuple[str, str]]:
    """The entries of a weight_map. Their files are not checked."""
    if not isinstance(weight_map, dict):
        found = shown(weight_map)
        raise invalid_index("The index has no weight_map", expected="an object that maps tensors to files", found=found)
    return weight_map.items()


def _distinct(files: list[str]) -> Collection[object]:
    """The distinct values of a weight_map; all of them where one is not hashable."""
    try:
        return dict.fromkeys(files)
    except TypeError:
        return files


def compare_index(index: Index, shards: list[ShardHeader]) -> Iterator[Finding]:
    """The contradictions between index and headers."""
    renamed = {shard.file: shard.names for shard in shards if shard.renamed}
    if renamed:
        runs = [Run(file, names_in_index(names, renamed.get(file, ()))) for file, names in index.runs]
        index = index._replace(runs=runs)
    listed = index.by_file()
    if not all(_are_alike([*shard.names], listed.get(shard.file, [])) for shard in shards):
        yield from _wrong_places(index.weight_map(), shards)
    # A wrong number is common: Quark's file-to-file mode writes the size of the files, other tools that of the model
    # before quantization. Nothing here uses it: sizes come from the headers.
    if not _is_size(index.total_size):
        yield finding(
            "index-total-size",
            INDEX_NAME,
            f"The total size in the index is {shown(index.total_size)}",
            hint="loaders use it only for estimates; conversion writes the correct size",
        )


def _are_alike(names: list[str], listed: list[str]) -> bool:
    """Whether names are the same in any order. Mostly sorted, they are sorted again in less time than hashed."""
    return names == listed or sorted(names) == sorted(listed)


def _is_size(value: object) -> bool:
    """Whether a value is a number of bytes; older tools write it with a fraction of zero."""
    if isinstance(value, float):
        return value >= 0 and value.is_integer()
    return value is None or (type(value) is int and 0 <= value < 2**63)


def _wrong_places(weight_map: dict[str, str], shards: list[ShardHeader]) -> Iterator[Finding]:
    stored: dict[str, str] = {}
    for shard in shards:
        stored.update(dict.fromkeys(shard.names, shard.file))
    contents = {shard.file: set(shard.names) for shard in shards}
    missing = [name for name, file in weight_map.items() if file in contents and name not in contents[file]]
    extra = [name for name in stored if name not in weight_map]
    if missing:
        listed, holder = weight_map[missing[0]], stored.get(missing[0], "no file")
        yield from FindingsAbout(
            "index-mismatch",
            missing,
            f"{plural(len(missing), 'tensor')} missing from the listed file; the index puts the first in {listed}, but "
            f"{holder} holds it",
            hint="download the checkpoint again, or rebuild the index",
        )
    if extra:
        yield from FindingsAbout(
            "index-mismatch",
            extra,
            f"{plural(len(extra), 'stored tensor')} not listed in the index, the first in {stored[extra[0]]}",
            hint="rebuild the index: loaders that follow it drop these tensors",
        )
