"""Which files of a directory are the shards of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.json_files import has_file
from quarkconv.files.local import LocalFiles
from quarkconv.files.regular import CHECK_ACCESS
from quarkconv.findings import OTHER_FORMAT, Finding, FindingsAbout
from quarkconv.headers.file_names import CONFIG_NAME, INDEX_NAME
from quarkconv.headers.index import MAX_SHARDS, Index
from quarkconv.headers.rank_index import refuse_ranks
from quarkconv.headers.unfinished import refuse_unfinished
from quarkconv.text import plural

SINGLE_NAME: Final = "model.safetensors"
OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")
"""Ends of the names of weights in formats that are not read."""
_OF_RANKS: Final = re.compile(r"(?:model-(?:rank-\d+|pp-\d+-tp-\d+)-part-\d+|rank\d+)\.safetensors")
"""Names of the files of ``save_sharded_state`` (vLLM 0.33, ``sharded_state_loader.py``; SGLang's are the same), and of
TensorRT-LLM's checkpoints (``save_checkpoint`` in ``models/modeling_utils.py``)."""
_NUMBERED: Final = re.compile(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", re.DOTALL | re.ASCII)
"""Names of shards that say how many there are."""
_OF_TRAINING: Final = ("training_args", "optimizer", "scheduler", "rng_state", "random_states", "scaler")
"""Starts of the names of files of a training run, which are not weights."""
_PREFERRED: Final = "consolidated"
"""Start of the names of files in Mistral's format. Where one exists, vLLM loads these alone (``load_format="auto"`` in
``default_loader.py`` of 0.28 to 0.33)."""


def check_directory(root: Path) -> None:
    """Refuse a missing directory, a file, an unfinished conversion, and the folder of a conversion by rank.

    Raises:
        SourceError: it is one of these, or cannot be read.
    """
    try:
        _check_directory(root)
        os.scandir(os.path.abspath(root)).close()
    except OSError as error:
        raise SourceError(
            "The model directory cannot be read",
            code="shard-missing",
            file=str(root),
            found=error.strerror,
            hint=CHECK_ACCESS if isinstance(error, PermissionError) else None,
        ) from error


def _check_directory(root: Path) -> None:
    if root.is_file():
        raise SourceError(
            "The model is a file",
            code="shard-missing",
            file=str(root),
            expected="a directory with config.json and *.safetensors",
            found="a file",
            hint=f"give its directory: {root.parent}",
        )
    if not root.is_dir():
        raise SourceError(
            "The model directory does not exist",
            code="shard-missing",
            file=str(root),
            expected="a directory with config.json and *.safetensors, or a Hub repo id such as org/name",
            found="nothing",
            hint="check the path",
        )
    refuse_unfinished(root)
    refuse_ranks(root)


def shard_names(store: Files, present: list[str], index: Index | None) -> list[str]:
    """The shards of the model: those of the index; without an index model.safetensors, or else every file.

    Where names of files say how many there are, as in ``model-00001-of-00003.safetensors``, the others are included.

    Raises:
        SourceError: there is none.
    """
    if index is not None:
        return index.files
    if SINGLE_NAME in present:
        return [SINGLE_NAME]
    if not present:
        raise SourceError(
            "The directory holds no safetensors file",
            code="shard-missing",
            file=str(store.root),
            expected=f"{SINGLE_NAME}, or shards with {INDEX_NAME}",
            found="no *.safetensors",
            hint=_snapshot_hint(store) or "give the directory that holds config.json and the weights",
        )
    return sorted({*present, *_numbered(present)})


def _snapshot_hint(store: Files) -> str | None:
    """The next step for a folder of the Hub's cache, ``models--org--name``, whose snapshots are the models; else None.

    Source: ``huggingface_hub``'s cache. ``refs/main`` holds the commit of the latest download of the default revision.
    """
    root, snapshots, latest = store.root, list[str](), ""
    with suppress(OSError, UnicodeDecodeError):
        if isinstance(store, LocalFiles) and root.name.startswith("models--"):
            snapshots = sorted(os.listdir(root / "snapshots"))
            latest = (root / "refs" / "main").read_text("utf-8").strip()
    if not snapshots:
        return None
    commit = latest if latest in snapshots else snapshots[0]
    return f"the Hub's cache keeps models in snapshots: give {root / 'snapshots' / commit}"


def _numbered(present: list[str]) -> Iterator[str]:
    """All shards of a model of which some are present, by the count in their names."""
    counts: dict[tuple[str, ...], list[str]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, present)):
        start, number, *rest = match.groups()
        counts.setdefault((start, *rest), []).append(number)
    for (start, of, count, end), numbers in counts.items():
        first = 0 if any(int(number) == 0 for number in numbers) else 1
        if len(count) <= len(str(MAX_SHARDS)) + 1 and len(numbers) < int(count) <= MAX_SHARDS:
            for number in range(first, first + int(count)):
                yield f"{start}{number:0{len(numbers[0])}}{of}{count}{end}"


def in_another_format(store: Files, present: list[str], index: Index | None) -> Iterator[Finding]:
    """The weights of a model that has none in safetensors, or an engine's own parameters.

    Args:
        store: the files.
        present: the safetensors files.
        index: the index of those; None without one.
    """
    of_ranks = [] if index is not None else [name for name in present if _OF_RANKS.match(name)]
    yield from FindingsAbout(
        OTHER_FORMAT,
        of_ranks,
        f"{plural(len(of_ranks), 'file')} with the parameters of an engine's ranks, as saved by vLLM, SGLang "
        "or TensorRT-LLM",
        hint="give the model that the engine loaded: these parameters are merged, divided and possibly reordered",
    )
    yield from _in_folders(store, present, index)
    if present or index is not None:
        return
    named = (name for name in _beside_config(store) if name.endswith(OTHER_WEIGHTS))
    others = [name for name in named if not name.startswith(_OF_TRAINING)]
    yield from FindingsAbout(
        OTHER_FORMAT,
        others,
        f"{plural(len(others), 'file')} with weights in other formats, but no safetensors file",
        hint="give the model's safetensors export; quarkconv reads no other format",
    )


def _in_folders(store: Files, present: list[str], index: Index | None) -> Iterator[Finding]:
    """Shards in folders below the model's directory: those of the index, or all where there are no others."""
    listed = [] if index is None else index.files
    if index is None and not present and has_file(store, CONFIG_NAME):
        listed = [path.as_posix() for path in store.names() if path.suffix == ".safetensors"]
    names = [name for name in listed if "/" in name]
    yield from FindingsAbout(
        OTHER_FORMAT,
        names,
        f"{plural(len(names), 'safetensors file')} in subfolders, below config.json",
        hint="quarkconv and engines read shards beside config.json: move them there, and update the index",
    )


def unused(present: list[str], shards: list[str], index: Index | None) -> Iterator[Finding]:
    """Files that are not shards of the model: those that engines load all the same, and others."""
    names = sorted(set(present) - set(shards))
    loaded = [name for name in names if index is None or name.startswith(_PREFERRED)]
    yield from FindingsAbout(
        "file-conflict",
        loaded,
        f"{plural(len(loaded), 'safetensors file')} beside the shards; "
        + (
            "without an index engines load every file"
            if index is None
            else f"vLLM loads {_PREFERRED}*.safetensors instead"
        ),
        hint="remove them, or convert: conversion leaves them out",
    )
    if index is not None:
        others = [name for name in names if name not in loaded]
        yield from FindingsAbout(
            "file-unused",
            others,
            f"{plural(len(others), 'safetensors file')} not listed in {INDEX_NAME}",
            hint="conversion leaves them out: remove them, or add their tensors to the index",
        )


def safetensors_files(store: Files) -> list[str]:
    """The safetensors files beside config.json."""
    return [name for name in _beside_config(store) if name.endswith(".safetensors")]


def _beside_config(store: Files) -> list[str]:
    """The files and links of the directory itself, sorted."""
    if isinstance(store, LocalFiles):
        return sorted(os.listdir(store.root))
    return sorted(path.name for path in store.names() if len(path.parts) == 1)
