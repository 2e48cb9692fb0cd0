"""A checkpoint as its headers tell it: config.json, the index and the header of every shard.

Opening reads no tensor data and believes nothing twice: what is missing, malformed or contradictory becomes a
finding, and whatever can still be read is there, so that ``inspect`` can describe a damaged checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarkconv.dtypes import TensorType
from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.json_files import MAX_CONFIG_BYTES, link_error, read_json_of
from quarkconv.files.local import LocalFiles
from quarkconv.files.regular import leads_outside, walk
from quarkconv.findings import Finding, Severity, as_finding, finding
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.index import INDEX_NAME as INDEX_NAME
from quarkconv.headers.index import compare_index, read_index
from quarkconv.headers.rank_index import refuse_ranks
from quarkconv.headers.remote import READING_HEADERS, expect_headers, read_header_of
from quarkconv.headers.safetensors import MAX_TENSORS, ShardHeader, TensorRef
from quarkconv.headers.unfinished import refuse_unfinished
from quarkconv.progress import SILENT, Progress, counting

CONFIG_NAME: Final = "config.json"
SINGLE_NAME: Final = "model.safetensors"
MANIFEST_NAME: Final = "quarkconv.json"
"""What a conversion wrote; see :mod:`quarkconv.plan.manifest`."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of a checkpoint.

    Attributes:
        store: where the files are.
        config: config.json, ``{}`` when it cannot be read.
        shards: the header of every file that holds tensors of the model, in the order of their names.
        types: name -> dtype and shape of every tensor.
        findings: what is wrong with the files themselves.
    """

    store: Files
    config: dict[str, Any]
    shards: tuple[ShardHeader, ...]
    types: dict[str, TensorType]
    findings: tuple[Finding, ...]

    @property
    def root(self) -> Path:
        """The directory; of a model that is read from the Hub, its name, for people only."""
        return self.store.root

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes, without headers."""
        return sum(shard.size + shard.truncated - shard.data_start for shard in self.shards)

    def refs(self) -> dict[str, TensorRef]:
        """Name -> byte range of every tensor."""
        with collector_paused():
            return {name: ref for shard in self.shards for name, ref in shard.refs()}

    def files(self) -> Iterator[Path]:
        """Every file below the root that lies in no hidden folder, relative to the root, in the order of names."""
        return self.store.names()


def open_checkpoint(place: Path | Files, progress: Progress = SILENT) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        place: its directory, or its files wherever they are.
        progress: counts the headers that were read.

    Raises:
        SourceError: the directory does not exist, is an unfinished conversion, or holds no safetensors file.
        HubError: the Hub does not give what has to be read.
    """
    store = LocalFiles(place) if isinstance(place, Path) else place
    root = store.root if isinstance(store, LocalFiles) else None
    if root is not None:
        _check_directory(root)
    findings: list[Finding] = []
    config: dict[str, Any] = {}
    try:
        config = read_json_of(store, CONFIG_NAME, code="config-invalid", limit=MAX_CONFIG_BYTES)
    except SourceError as error:
        findings.append(as_finding(error))
    index = read_index(store, findings)
    shards: list[ShardHeader] = []
    types: dict[str, TensorType] = {}
    if root is not None:
        findings.extend(_outside(root))
    tensors, odd = 0, list[str]()
    with collector_paused():
        files = _shard_names(store, None if index is None else index.weight_map, findings)
        expect_headers(store, files, progress)
        if root is not None:  # of remote files, they are all there by now
            progress.step(READING_HEADERS, len(files), "shard")
        for file in files if root is None else counting(files, progress):
            if root is not None and leads_outside(root, file) is not None:  # said above
                continue
            try:
                shard = read_header_of(store, file)
            except SourceError as error:
                findings.append(as_finding(error))
                continue
            tensors += len(shard.names)
            if tensors > MAX_TENSORS:
                raise _too_many(store.root)
            if shard.truncated:
                findings.append(_truncated(shard))
            odd += shard.odd_names
            shards.append(shard)
            types.update(zip(shard.names, shard.types, strict=True))
        findings.extend(_odd_names(odd))
        findings.extend(_duplicates(shards, len(types)))
        if index is not None:
            findings.extend(compare_index(index, shards))
    return Checkpoint(store, config, tuple(shards), types, tuple(findings))


def _check_directory(root: Path) -> None:
    if not root.is_dir():
        raise SourceError(
            "There is no such model directory", code="shard-missing", file=str(root),
            expected="a directory with config.json and *.safetensors, or a Hub repo id such as org/name",
            found="a file" if root.exists() else "nothing",
        )  # fmt: skip
    refuse_unfinished(root)
    refuse_ranks(root)


def _too_many(root: Path) -> SourceError:
    return SourceError(
        "The checkpoint holds more tensors than can be believed", file=str(root),
        expected=f"at most {MAX_TENSORS} tensors", found="more",
    )  # fmt: skip


def _odd_names(names: list[str]) -> Iterator[Finding]:
    unprintable = [name for name in names if not name.isprintable()]
    if unprintable:
        yield finding(
            "tensor-name", unprintable[0],
            f"{len(unprintable)} tensor(s) have names that cannot be printed, first {unprintable[0]}",
            hint="no tool writes such names: ask yourself what else the files hold", count=len(unprintable),
        )  # fmt: skip
    paths = [name for name in names if name.isprintable()]
    if paths:
        yield finding(
            "tensor-name", paths[0], f"{len(paths)} tensor(s) have names with slashes, first {paths[0]}",
            hint="quarkconv never takes them for paths; see that nothing else does", count=len(paths),
            severity=Severity.INFO,
        )  # fmt: skip


def _outside(root: Path) -> Iterator[Finding]:
    """Files of the model that are links to somewhere else: a conversion would copy what lies there."""
    links = sorted(name for name, entry in walk(root, hidden=False) if entry.is_symlink())
    links = [name for name in links if name not in (CONFIG_NAME, INDEX_NAME)]  # whoever reads these has said it
    found = [(name, target) for name in links if (target := leads_outside(root, name)) is not None]
    if found:
        name, target = found[0]
        error = link_error(name, target)
        yield finding(
            error.code, name,
            f"{len(found)} file(s) are links that lead out of the model's directory: {name} leads to {target}",
            hint=error.hint or "", count=len(found),
        )  # fmt: skip


def _shard_names(store: Files, weight_map: dict[str, str] | None, findings: list[Finding]) -> list[str]:
    """The files that make up the model: those of the index; without one, model.safetensors or whatever there is."""
    present = _present(store)
    if weight_map is not None:
        named = sorted(set(weight_map.values()))
        unused = sorted(set(present) - set(named))
        if unused:
            findings.append(
                finding(
                    "file-unused", unused[0], f"{len(unused)} safetensors file(s) are not named by {INDEX_NAME}",
                    hint="remove them, or repair the index", count=len(unused),
                )
            )  # fmt: skip
        return named
    if SINGLE_NAME in present:
        return [SINGLE_NAME]
    if not present:
        raise SourceError(
            "The directory holds no safetensors file", code="shard-missing", file=str(store.root),
            expected=f"{SINGLE_NAME}, or shards with {INDEX_NAME}", found="no *.safetensors",
            hint="give the directory that holds config.json and the weights",
        )  # fmt: skip
    return present


def _present(store: Files) -> list[str]:
    """The safetensors files that lie beside config.json."""
    if isinstance(store, LocalFiles):
        return sorted(path.name for path in store.root.glob("*.safetensors"))
    return sorted(path.name for path in store.names() if path.suffix == ".safetensors" and len(path.parts) == 1)


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
        yield finding(
            "tensor-duplicate", names[0], f"{len(names)} tensor(s) lie in {one} and in {other}, first {names[0]}",
            hint="keep one of them; engines disagree about which one they load", count=len(names),
        )  # fmt: skip


def _truncated(shard: ShardHeader) -> Finding:
    available = shard.size - shard.data_start
    lost = [name for name, end in zip(shard.names, shard.ends, strict=True) if end > available]
    return finding(
        "shard-truncated", shard.file,
        f"The file ends {shard.truncated} bytes before its data does; {len(lost)} tensor(s) are cut, first {lost[0]}",
        hint="download or copy the file again", count=len(lost),
    )  # fmt: skip
