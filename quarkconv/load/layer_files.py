"""Reading the layers of a checkpoint: codes into an arena by several threads, their checksums on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
import xxhash
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.errors import SourceError
from quarkconv.experts.naming import ROLES, Role
from quarkconv.experts.topology import MoELayer
from quarkconv.files.page_cache import in_page_cache
from quarkconv.load.arenas import Arena
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reads import PAGE, LayerRead, layer_reads, w2_offset
from quarkconv.load.open_files import BLOCK, OpenFiles
from quarkconv.plan.manifest import WrittenTensor

_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Mismatch(NamedTuple):
    """Pieces of one tensor whose checksum differs from the manifest's.

    Attributes:
        tensor: the tensor.
        source: the tensor of the source that the first of them came from.
        wrong: how many pieces differ.
        pieces: how many pieces the tensor has.
    """

    tensor: str
    source: str
    wrong: int
    pieces: int


class LayerFiles:
    """The files of a checkpoint, read layer by layer. A context manager.

    Args:
        description: the checkpoint.
        written: what its manifest says of its tensors; empty for no checksums.
        pool: threads to read with.
        progress: called with the number of bytes whose checksums were compared.
    """

    def __init__(
        self,
        description: Description,
        written: Mapping[str, WrittenTensor],
        pool: ThreadPoolExecutor,
        progress: Callable[[int], None],
    ) -> None:
        self.description = description
        self._written = written
        self._pool = pool
        self._progress = progress
        self._refs = description.checkpoint.refs()
        self._files = OpenFiles(description.checkpoint.root)
        self._direct = OpenFiles(description.checkpoint.root, _DIRECT)
        self._without_direct: set[str] = set()

    def __enter__(self) -> LayerFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._direct.close()

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self._refs

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._refs[name].shape

    def is_float(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor, and of floats."""
        return self.has(name) and self._refs[name].dtype in _DTYPES

    def read(self, layer: MoELayer, arena: Arena) -> tuple[FusedExperts, list[Mismatch]]:
        """Read a layer: its experts, whose codes are views of the arena, and what differs from the manifest.

        Raises:
            SourceError: a file cannot be read.
        """
        reads = layer_reads(layer, self._refs, self._written)
        wrong: dict[str, list[LayerRead]] = {}
        for item, same in zip(
            reads, self._pool.map(lambda item: self._fill(item, arena.memory, on_page=True), reads), strict=True
        ):
            if not same:
                wrong.setdefault(item.tensor, []).append(item)
        mismatches = [
            Mismatch(name, items[0].source, len(items), len(self._written[name].pieces))
            for name, items in wrong.items()
        ]
        return self._experts(layer, arena), mismatches

    def small(self, name: str, part: int | None = None) -> Tensor:
        """A tensor of floats, or the part of that number along its first dimension, which alone is read then.

        Raises:
            SourceError: its file cannot be read, or its dtype is none of floats.
        """
        ref = self._refs[name]
        if ref.dtype not in _DTYPES:
            raise SourceError("A tensor has another dtype than it should", file=ref.file, tensor=name,
                              expected="floats", found=ref.dtype)  # fmt: skip
        nbytes, shape = (ref.nbytes, ref.shape) if part is None else (ref.nbytes // ref.shape[0], ref.shape[1:])
        data = bytearray(nbytes)
        self._fill(LayerRead(name, ref.file, ref.start + (part or 0) * nbytes, nbytes, 0), memoryview(data))
        values = torch.frombuffer(data, dtype=_DTYPES[ref.dtype]) if data else torch.empty(0, dtype=_DTYPES[ref.dtype])
        return values.reshape(shape)

    def _experts(self, layer: MoELayer, arena: Arena) -> FusedExperts:
        experts, hidden, inner = layer.experts, layer.hidden, layer.intermediate
        codes = arena.tensor.view(torch.int8)
        w13 = codes[: 2 * experts * inner * hidden].view(experts, 2 * inner, hidden)
        w2 = codes[w2_offset(layer) :][: experts * hidden * inner].view(experts, hidden, inner)
        scales = {role: self._scales(layer, role) for role in ROLES}
        gate_up = scales["gate"] if layer.layout == "fused" else torch.cat([scales["gate"], scales["up"]], dim=1)
        return FusedExperts(
            layer.index, layer.prefix, w13, gate_up.unsqueeze(-1).contiguous(), w2,
            scales["down"].unsqueeze(-1).contiguous(), self._input_scales(layer, "gate"),
            self._input_scales(layer, "down"),
        )  # fmt: skip

    def _scales(self, layer: MoELayer, role: Role) -> Tensor:
        """Scales of the rows of a projection, float32 [E, rows]; those of a fused gate are those of up as well."""
        rows = layer.hidden if role == "down" else layer.intermediate * (2 if layer.layout == "fused" else 1)
        if layer.layout == "per_expert":
            names = [layer.projection(role, expert).names.scale for expert in range(layer.experts)]
            parts = [self.small(name).float().reshape(-1) for name in names]
            return torch.stack([part.expand(rows) for part in parts])
        stacked = self.small(layer.projection(role, 0).names.scale).float()
        return stacked.reshape(layer.experts, -1).expand(layer.experts, rows)

    def _input_scales(self, layer: MoELayer, role: Role) -> Tensor | None:
        """Static input scales, float32 [E]; None where activations are quantized per token."""
        if layer.layout == "per_expert":
            names = [layer.projection(role, expert).names.input_scale for expert in range(layer.experts)]
            if not all(map(self.has, names)):
                return None
            return torch.stack([self.small(name).float().reshape(()) for name in names])
        name = layer.projection(role, 0).names.input_scale
        return self.small(name).float().reshape(layer.experts) if self.has(name) else None

    def _fill(self, item: LayerRead, memory: memoryview, *, on_page: bool = False) -> bool:
        """Read one range to its place in memory, which may start on a page; False when its checksum is another."""
        descriptor = self._files[item.file]
        hasher = xxhash.xxh3_128() if item.checksum else None
        done = 0
        while done < item.nbytes:
            view = memory[item.at + done : item.at + min(done + BLOCK, item.nbytes)]
            try:
                count = (
                    self._read_block(item, view, done, descriptor)
                    if on_page
                    else os.preadv(descriptor, [view], item.start + done)
                )
            except OSError as error:
                raise self._unreadable(item, error.strerror or str(error)) from error
            if count == 0:
                raise self._unreadable(item, f"the file ends at {item.start + done}")
            if hasher is not None:
                hasher.update(view[:count])
            done += count
        if hasher is None:
            return True
        self._progress(item.nbytes)
        return hasher.hexdigest() == item.checksum

    def _read_block(self, item: LayerRead, view: memoryview, done: int, descriptor: int) -> int:
        """Read a block: from the page cache where it is there, else past it where it lies on pages."""
        start = item.start + done
        on_pages = not ((item.at + done) % PAGE or start % PAGE or len(view) % PAGE)
        direct = self._direct_descriptor(item.file) if on_pages else None
        if direct is not None and not in_page_cache(descriptor, start, len(view)):
            try:
                return os.preadv(direct, [view], start)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        return os.preadv(descriptor, [view], start)

    def _direct_descriptor(self, file: str) -> int | None:
        """The file opened for reads past the page cache; None where the system does not do that."""
        if not _DIRECT or file in self._without_direct:
            return None
        try:
            return self._direct[file]
        except SourceError:
            self._without_direct.add(file)
            return None

    def _unreadable(self, item: LayerRead, found: str) -> SourceError:
        return SourceError(
            "A tensor cannot be read", code="shard-truncated", file=item.file, tensor=item.tensor, found=found
        )
