"""A checkpoint: config.json, the index, and the header of every shard. No tensor data is read.

Whatever is missing, malformed or contradictory becomes a finding, and the rest is still read, so that ``inspect`` can
describe a damaged checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from quarkconv.defects import invalid_header
from quarkconv.dtypes import TensorType, TensorTypes
from quarkconv.errors import COPY_AGAIN, SourceError
from quarkconv.files.base import Files
from quarkconv.files.json_files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, has_file, link_error, read_json_of
from quarkconv.files.local import LocalFiles
from quarkconv.files.regular import leads_outside, walk
from quarkconv.findings import Finding, FindingsAbout, Severity, as_finding, finding
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.file_names import ASCEND_NAME, CONFIG_NAME, INDEX_NAME
from quarkconv.headers.index import Index, compare_index, read_index
from quarkconv.headers.rank_index import refuse_rank_objects
from quarkconv.headers.remote import READING_HEADERS, expect_headers, read_header_of
from quarkconv.headers.safetensors import MAX_TENSORS, ShardHeader, TensorRef
from quarkconv.headers.shard_files import check_directory, in_another_format, safetensors_files, shard_names, unused
from quarkconv.headers.unfinished import refuse_unfinished_objects
from quarkconv.progress import SILENT, Progress, counting
from quarkconv.text import plural

_ADAPTER_NAME: Final = "adapter_config.json"
_MERGE_ADAPTER: Final = "this is an adapter: merge it into its base model, and quantize the result"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of a checkpoint.

    Attributes:
        store: the files.
        config: config.json, ``{}`` when it cannot be read.
        ascend: quant_model_description.json of Ascend's msModelSlim; None without one.
        shards: the header of every file that holds tensors of the model, in the order of their names.
        types: name -> dtype and shape of every tensor.
        findings: defects of the files themselves.
    """

    store: Files
    config: dict[str, Any]
    shards: tuple[ShardHeader, ...]
    types: Mapping[str, TensorType]
    findings: tuple[Finding, ...]
    ascend: dict[str, Any] | None = None

    @property
    def root(self) -> Path:
        """The directory; for a model on the Hub its repo id, to show."""
        return self.store.root

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes, without headers."""
        return sum(shard.nbytes for shard in self.shards)

    def refs(self) -> dict[str, TensorRef]:
        """Name -> byte range of every tensor."""
        with collector_paused():
            return {name: ref for shard in self.shards for name, ref in shard.refs()}

    def files(self) -> Iterator[Path]:
        """Every file below the root and outside hidden folders, relative to the root, ordered by name."""
        return self.store.names()


def open_checkpoint(model: Path | Files, progress: Progress = SILENT) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        model: its directory, or its files.
        progress: counts the headers that were read.

    Raises:
        SourceError: the directory does not exist, is an unfinished conversion, or holds no weights.
        HubError: a request to the Hub failed.
    """
    store = LocalFiles(model) if isinstance(model, Path) else model
    root = store.root if isinstance(store, LocalFiles) else None
    _refuse_other_outputs(store, root)
    documents = _documents(store)
    config, ascend, index = documents.config, documents.ascend, documents.index
    findings = documents.findings
    if root is not None:
        findings.extend(_outside(root))
    with collector_paused():
        present = safetensors_files(store)
        unsupported = tuple(in_another_format(store, present, index))
        if unsupported:
            return Checkpoint(store, config, (), TensorTypes([]), unsupported, ascend)
        files = shard_names(store, present, index)
        findings.extend(unused(present, files, index))
        shards, damage = _shards(store, root, files, sorted(set(present) - set(files)), progress)
        findings.extend(damage)
        findings.extend(_odd_names([name for shard in shards for name in shard.odd_names]))
        types = TensorTypes([shard.tensors for shard in shards])
        findings.extend(_duplicates(shards, len(types)))
        findings.extend(_renamed(shards))
        if index is not None:
            findings.extend(compare_index(index, shards))
    return Checkpoint(store, config, tuple(shards), types, tuple(findings), ascend)


def _refuse_other_outputs(store: Files, root: Path | None) -> None:
    """Refuse what is not a checkpoint: no directory, an unfinished conversion, the folder of all ranks."""
    if root is not None:
        check_directory(root)
        return
    from quarkconv.files.remote import RemoteFiles  # imports threads and logging, which local models do not need

    if isinstance(store, RemoteFiles):
        refuse_unfinished_objects(store)
        refuse_rank_objects(store)


@dataclass(frozen=True, slots=True)
class _Documents:
    """The JSON files of a checkpoint; empty or None where one is missing or cannot be read, with findings about it."""

    config: dict[str, Any]
    ascend: dict[str, Any] | None
    index: Index | None
    findings: list[Finding]


def _documents(store: Files) -> _Documents:
    config: dict[str, Any] = {}
    ascend: dict[str, Any] | None = None
    index: Index | None = None
    findings: list[Finding] = []
    try:
        config = read_json_of(store, CONFIG_NAME, code="config-invalid", limit=MAX_CONFIG_BYTES)
    except SourceError as error:
        found = as_finding(error)
        findings.append(replace(found, hint=_MERGE_ADAPTER) if has_file(store, _ADAPTER_NAME) else found)
    try:
        if has_file(store, ASCEND_NAME):
            ascend = read_json_of(store, ASCEND_NAME, code="config-invalid", limit=MAX_INDEX_BYTES)
    except SourceError as error:
        findings.append(as_finding(error))
    try:
        index = read_index(store)
    except SourceError as error:
        findings.append(as_finding(error))
    return _Documents(config, ascend, index, findings)


def _shards(
    store: Files, root: Path | None, files: Sequence[str], others: Sequence[str], progress: Progress
) -> tuple[list[ShardHeader], list[Finding]]:
    """The headers of all shards that can be read, and findings about shards that cannot, or end too early.

    Args:
        store, root: the files; the directory of local ones.
        files: the shards.
        others: safetensors files beside them.
        progress: counts the headers.

    Raises:
        SourceError: there are too many tensors.
    """
    shards, findings = list[ShardHeader](), list[Finding]()
    tensors = 0
    expect_headers(store, files, progress)
    if root is not None:  # of remote files, they are all there by now
        progress.step(READING_HEADERS, len(files), "shard")
    for file in files if root is None else counting(files, progress):
        if root is not None and leads_outside(root, file) is not None:  # reported by _outside
            continue
        try:
            shard = read_header_of(store, file)
        except SourceError as error:
            findings.append(_stale(as_finding(error), others))
            continue
        tensors += len(shard.tensors)
        if tensors > MAX_TENSORS:
            raise _too_many(store.root)
        if shard.truncated:
            findings.append(_truncated(shard))
        shards.append(shard)
    return shards, findings


def _too_many(root: Path) -> SourceError:
    message = "The checkpoint has too many tensors"
    return invalid_header(str(root), message=message, expected=f"at most {MAX_TENSORS} tensors", found="more")


def _odd_names(names: list[str]) -> Iterator[Finding]:
    unprintable = [name for name in names if not name.isprintable()]
    yield from FindingsAbout(
        "tensor-name",
        unprintable,
        f"{plural(len(unprintable), 'tensor')} with an unprintable name",
        hint="no known tool writes such names; treat this checkpoint as suspicious",
    )
    paths = [name for name in names if name.isprintable()]
    yield from FindingsAbout(
        "tensor-name",
        paths,
        f"{plural(len(paths), 'tensor')} with slashes in the name",
        hint="quarkconv never uses them as paths; other tools may",
        severity=Severity.INFO,
    )


def _outside(root: Path) -> Iterator[Finding]:
    """Links that lead out of the model's directory: a conversion would copy their targets."""
    links = sorted(name for name, entry in walk(root, hidden=False) if entry.is_symlink())
    links = [name for name in links if name not in (CONFIG_NAME, INDEX_NAME)]  # reading these reports it
    found = [(name, target) for name in links if (target := leads_outside(root, name)) is not None]
    if found:
        error = link_error(*found[0])
        yield from FindingsAbout(
            error.code,
            [name for name, _ in found],
            f"{plural(len(found), 'link')} out of the model's directory, the first to {found[0][1]}",
            hint=error.hint or "",
        )


def _duplicates(shards: list[ShardHeader], distinct: int) -> Iterator[Finding]:
    if sum(len(shard.names) for shard in shards) == distinct:
        return
    first: dict[str, str] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for shard in shards:
        for name in shard.names:
            other = first.setdefault(name, shard.file)
            if other != shard.file:
                twice.setdefault((other, shard.file), []).append(name)
    for (one, other), names in twice.items():
        yield from FindingsAbout(
            "tensor-duplicate",
            names,
            f"{plural(len(names), 'tensor')} stored in both {one} and {other}",
            hint="keep one of them; engines disagree about which one they load",
        )


def _stale(found: Finding, unused: Sequence[str]) -> Finding:
    """The finding for an unreadable shard; where it is missing and other files exist, the index is stale."""
    if found.code != "shard-missing" or not unused:
        return found
    return replace(found, hint=f"the index is stale: rebuild it from the files that exist, such as {unused[0]}")


def _renamed(shards: list[ShardHeader]) -> Iterator[Finding]:
    renamed = [shard.file for shard in shards if shard.renamed]
    yield from FindingsAbout(
        "quantizer-names",
        renamed,
        f"Scales named weight_quantizer.scale, or row scales named weight_scale_inv, in {plural(len(renamed), 'file')}",
        hint="convert it: engines look for weight_scale and input_scale, and take weight_scale_inv for block scales",
    )


def _truncated(shard: ShardHeader) -> Finding:
    available = shard.size - shard.data_start
    lost = [name for name, end in zip(shard.names, shard.ends, strict=True) if end > available]
    return finding(
        "shard-truncated",
        shard.file,
        f"The file is {plural(shard.truncated, 'byte')} too short and cuts {plural(len(lost), 'tensor')}, "
        f"such as {lost[0]}",
        hint=COPY_AGAIN,
        count=len(lost),
    )
