"""Reading the layers of a checkpoint: codes to an arena by several threads, with checksums on the way."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
import xxhash
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.experts.layer import Part
from quarkconv.experts.naming import Role
from quarkconv.files.page_cache import in_page_cache
from quarkconv.load.arenas import Arena
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reads import CHUNK_BYTES, PAGE, LayerPart, LayerRead, layer_reads
from quarkconv.load.open_files import OpenFiles, open_files
from quarkconv.plan.manifest import WrittenTensor

READERS: Final = min(8, 2 * (os.cpu_count() or 1))
"""Threads that read: storage is fastest with several requests at once."""

_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_TORCH_DTYPES: Final = {
    **_DTYPES,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_ALIGNED: Final = 64
"""Bytes that the start of a tensor in memory is a multiple of."""


class Mismatch(NamedTuple):
    """Pieces of one tensor whose checksum differs from the manifest's.

    Attributes:
        tensor: the tensor.
        source: the tensor of the source that the first of these pieces came from.
        wrong: how many pieces differ.
        pieces: how many pieces the tensor has.
    """

    tensor: str
    source: str
    wrong: int
    pieces: int


class LayerReader:
    """Reads a checkpoint layer by layer. A context manager.

    Args:
        description: the checkpoint.
        pool: threads to read with.
        written: its manifest's tensors; empty for no checksums.
        progress: called with the number of bytes whose checksums were compared.
    """

    def __init__(
        self,
        description: Description,
        pool: ThreadPoolExecutor,
        written: Mapping[str, WrittenTensor] | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.description = description
        self._written = written or {}
        self._pool = pool
        self._progress = progress
        self.refs = description.checkpoint.refs()
        store = description.checkpoint.store
        self._files = open_files(store)
        self._direct = OpenFiles(store.root, _DIRECT) if isinstance(self._files, OpenFiles) else None
        self._without_direct: set[str] = set()

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        if self._direct is not None:
            self._direct.close()

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self.refs

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.refs[name].shape

    def is_float(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor, and of floats."""
        return self.has(name) and self.refs[name].dtype in _DTYPES

    def read(self, part: LayerPart, arena: Arena) -> tuple[FusedExperts, list[Mismatch]]:
        """Read a layer: its experts, whose codes are views of the arena, and what differs from the manifest.

        Raises:
            SourceError: a file cannot be read.
        """
        reads = list(layer_reads(part, self.refs, self._written))
        wrong: dict[str, list[LayerRead]] = {}
        for item, same in zip(reads, self._pool.map(lambda item: self._read(item, arena), reads), strict=True):
            if not same:
                wrong.setdefault(item.tensor, []).append(item)
        mismatches = [
            Mismatch(name, items[0].source, len(items), len(self._written[name].pieces))
            for name, items in wrong.items()
        ]
        return self._experts(part, arena), mismatches

    def floats(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor of floats; or one part of it, flat, which alone is read then.

        Raises:
            SourceError: its file cannot be read, or its elements are not floats.
        """
        ref = self.refs[name]
        if ref.dtype not in _DTYPES:
            raise SourceError(
                "A tensor has the wrong dtype",
                code="scale-dtype",
                file=ref.file,
                tensor=name,
                expected="floats",
                found=ref.dtype,
            )
        number, of = part or (0, 1)
        data = bytearray(ref.nbytes // of)
        self._fill(LayerRead(name, ref.file, ref.start + number * len(data), len(data), 0), memoryview(data))
        values = torch.frombuffer(data, dtype=_DTYPES[ref.dtype]) if data else torch.empty(0, dtype=_DTYPES[ref.dtype])
        return values if part is not None else values.reshape(ref.shape)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors of any dtype that torch has, read by all threads into memory of their own.

        Raises:
            SourceError: a file cannot be read.
            UnsupportedError: a dtype is not one of torch's.
        """
        reads, places, at = [], {}, 0
        for name in dict.fromkeys(names):
            ref = self.refs[name]
            dtype = _TORCH_DTYPES.get(ref.dtype)
            if dtype is None:
                raise UnsupportedError(
                    "A tensor has a dtype that torch does not have", file=ref.file, tensor=name, found=ref.dtype
                )
            places[name] = (at, dtype)
            for start in range(0, ref.nbytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, ref.nbytes - start)
                reads.append(LayerRead(name, ref.file, ref.start + start, size, at + start))
            at += -(-ref.nbytes // _ALIGNED) * _ALIGNED
        arena = Arena(at)
        for _ in self._pool.map(lambda item: self._fill(item, arena.memory), reads):
            pass
        return {
            name: arena.tensor[at : at + self.refs[name].nbytes].view(dtype).reshape(self.refs[name].shape)
            for name, (at, dtype) in places.items()
        }

    def _experts(self, part: LayerPart, arena: Arena) -> FusedExperts:
        experts, hidden, inner = len(part.experts), part.layer.hidden, len(part.inner)
        codes = arena.tensor.view(torch.int8)
        w13 = codes[: part.w13_nbytes].view(experts, len(part.ups) * inner, hidden)
        w2 = codes[part.w2_offset :][: experts * part.matrix].view(experts, hidden, inner)
        read = functools.cache(self.floats)  # a tensor that experts share is read once
        ups, down = [_scales(part, role, read) for role in part.ups], _scales(part, "down", read)
        w13_bias = w2_bias = None
        if part.layer.biased:
            w13_bias = torch.cat([_biases(part, role, read) for role in part.ups], dim=1)
            w2_bias = _biases(part, "down", read)
        return FusedExperts(
            layer=part.layer.index,
            module=part.layer.prefix,
            w13=w13,
            w13_scale=torch.cat(ups, dim=1).unsqueeze(-1),
            w2=w2,
            w2_scale=down.unsqueeze(-1),
            w13_input_scale=self._input_scales(part, part.ups[0], read),
            w2_input_scale=self._input_scales(part, "down", read),
            w13_bias=w13_bias,
            w2_bias=w2_bias,
        )

    def _input_scales(self, part: LayerPart, role: Role, read: Callable[[str], Tensor]) -> Tensor | None:
        """Static input scales, float32 [E]; None where activations are quantized per token."""
        layer, scales = part.layer, []
        for expert in part.experts:
            name = layer.projection(role, expert).names.input_scale
            if not self.has(name):
                return None
            scales.append(read(name).reshape(-1)[0 if layer.layout == "per_expert" else expert])
        return torch.stack(scales).float()

    def _read(self, item: LayerRead, arena: Arena) -> bool:
        """Read one range to its place in an arena; False when its checksum differs."""
        if not item.run:
            return self._fill(item, arena.memory, on_page=True)
        data = bytearray(item.nbytes)
        self._fill(item._replace(at=0), memoryview(data))
        rows = (item.nbytes - item.run) // item.stride + 1
        columns = torch.frombuffer(data, dtype=torch.uint8).as_strided((rows, item.run), (item.stride, 1))
        arena.tensor[item.at : item.at + rows * item.run].view(rows, item.run).copy_(columns)
        return True

    def _fill(self, item: LayerRead, memory: memoryview, *, on_page: bool = False) -> bool:
        """Read one range to its place in memory, which may start on a page; False when its checksum differs."""
        hasher = xxhash.xxh3_128() if item.checksum else None
        done = 0
        while done < item.nbytes:
            view = memory[item.at + done : item.at + min(done + self._files.block, item.nbytes)]
            try:
                count = (
                    self._read_block(item, view, done)
                    if on_page
                    else self._files.read_into(item.file, view, item.start + done)
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

    def _read_block(self, item: LayerRead, view: memoryview, done: int) -> int:
        """Read a block: from the page cache where it is there, else past it where it lies on pages."""
        start = item.start + done
        on_pages = not ((item.at + done) % PAGE or start % PAGE or len(view) % PAGE)
        direct = self._direct_descriptor(item.file) if on_pages else None
        if direct is not None and not self._is_cached(item.file, start, len(view)):
            try:
                return os.preadv(direct, [view], start)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        return self._files.read_into(item.file, view, start)

    def _is_cached(self, file: str, start: int, nbytes: int) -> bool:
        return isinstance(self._files, OpenFiles) and in_page_cache(self._files[file], start, nbytes)

    def _direct_descriptor(self, file: str) -> int | None:
        """The file opened for reads past the page cache; None where the system does not do that."""
        if not _DIRECT or self._direct is None or file in self._without_direct:
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


def _scales(part: LayerPart, role: Role, read: Callable[[str], Tensor]) -> Tensor:
    """Scales of the rows of a projection, float32 [E, rows]; a scale per tensor is repeated."""
    rows = range(part.layer.hidden) if role == "down" else part.inner
    scales = []
    for expert in part.experts:
        stored = part.layer.projection(role, expert)
        scale = _part(read(stored.names.scale).reshape(-1), stored.scale, alternate=stored.alternate)
        scales.append(scale[rows.start : rows.stop] if len(scale) > 1 else scale.expand(len(rows)))
    return torch.stack(scales).float()


def _biases(part: LayerPart, role: Role, read: Callable[[str], Tensor]) -> Tensor:
    """Biases of a projection, float32 [E, rows]. Outputs of tensor-parallel ranks add up, so one of them has down's."""
    rows = range(part.layer.hidden) if role == "down" else part.inner
    biases = []
    for expert in part.experts:
        stored = part.layer.projection(role, expert)
        bias = _part(
            read(f"{stored.names.weight.removesuffix('.weight')}.bias"), stored.weight, alternate=stored.alternate
        )
        biases.append(bias[rows.start : rows.stop].float())
    stacked = torch.stack(biases)
    return torch.zeros_like(stacked) if role == "down" and part.rank.parallel == "tp" and part.rank.rank else stacked


def _part(values: Tensor, part: Part, *, alternate: bool = False) -> Tensor:
    if alternate and part.of > 1:
        return values.reshape(-1, part.of)[:, part.number]
    size = len(values) // part.of
    return values[part.number * size :][:size]
