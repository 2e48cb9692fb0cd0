"""Reading the layers of a checkpoint: codes to an arena by several threads, with checksums on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.experts.layer import Part, StoredProjection
from quarkconv.experts.naming import Role
from quarkconv.headers.safetensors import TensorRef
from quarkconv.load.arenas import Arena, HostMemory, Memory
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reads import LayerPart, LayerRead, layer_reads, tensor_reads
from quarkconv.load.ranges import RangeReader
from quarkconv.plan.manifest import WrittenTensor

READERS: Final = min(8, 2 * (os.cpu_count() or 1))
"""Threads that read: storage is fastest with several requests at once."""

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
        self._ranges = RangeReader(description.checkpoint.store)

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._ranges.close()

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self.refs

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.refs[name].shape

    def is_float(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor, and of floats."""
        return self.has(name) and self.refs[name].dtype in _DTYPES

    def read(self, part: LayerPart, arena: Memory) -> tuple[FusedExperts, list[Mismatch]]:
        """Read a layer: its experts, whose codes are views of the arena, and what differs from the manifest.

        Raises:
            SourceError: a file cannot be read.
        """
        reads = list(layer_reads(part, self.refs, self._written))
        wrong: dict[str, list[LayerRead]] = {}
        try:
            for item, same in zip(reads, self._pool.map(lambda item: self._read(item, arena), reads), strict=True):
                if not same:
                    wrong.setdefault(item.tensor, []).append(item)
        finally:
            arena.finish()
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
        ref = self._float_ref(name)
        number, of = part or (0, 1)
        size = ref.nbytes // of
        memory = _scratch(size)
        self._ranges.fill(LayerRead(name, ref.file, ref.start + number * size, size, 0), memory)
        values = memory.tensor[:size].view(_DTYPES[ref.dtype])
        return values if part is not None else values.reshape(ref.shape)

    def _float_ref(self, name: str) -> TensorRef:
        ref = self.refs[name]
        if ref.dtype not in _DTYPES:
            raise SourceError(
                "A tensor has the wrong dtype",
                code="scale-dtype",
                file=self._path(ref),
                tensor=name,
                expected="floats",
                found=ref.dtype,
                hint="run `quarkconv inspect`",
            )
        return ref

    def _path(self, ref: TensorRef) -> str:
        return f"{self.description.checkpoint.root}/{ref.file}"

    def tensors(self, names: Iterable[str], memory: Callable[[int], Memory] = Arena) -> dict[str, Tensor]:
        """Whole tensors of any dtype that torch has, read by all threads in the order of the files.

        Args:
            names: the tensors.
            memory: takes a number of bytes, and returns the memory that all of them are views of.

        Raises:
            SourceError: a file cannot be read.
            UnsupportedError: a dtype is not one of torch's.
        """
        refs = {name: self.refs[name] for name in names}
        for name, ref in refs.items():
            if ref.dtype not in _TORCH_DTYPES:
                raise UnsupportedError(
                    "A tensor has a dtype that torch lacks",
                    file=self._path(ref),
                    tensor=name,
                    found=ref.dtype,
                    hint="install a newer torch",
                )
        reads, places, nbytes = tensor_reads(refs)
        arena = memory(nbytes)
        try:
            for _ in self._pool.map(lambda item: self._ranges.fill(item, arena), reads):
                pass
        finally:
            arena.finish()
        return {
            name: arena.tensor[places[name] :][: ref.nbytes].view(_TORCH_DTYPES[ref.dtype]).reshape(ref.shape)
            for name, ref in refs.items()
        }

    def _experts(self, part: LayerPart, arena: Memory) -> FusedExperts:
        experts, hidden, inner = len(part.experts), part.layer.hidden, len(part.inner)
        codes = arena.tensor.view(torch.int8)
        w13 = codes[: part.w13_nbytes].view(experts, len(part.ups) * inner, hidden)
        w2 = codes[part.w2_offset :][: experts * part.matrix].view(experts, hidden, inner)
        names = dict.fromkeys(self._float_names(part))
        for name in names:
            self._float_ref(name)
        floats = self.tensors(names)  # a tensor that experts share is read once
        read = floats.__getitem__
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
            w13_input_scale=_input_scales(part, part.ups[0], floats),
            w2_input_scale=_input_scales(part, "down", floats),
            w13_bias=w13_bias,
            w2_bias=w2_bias,
        )

    def _float_names(self, part: LayerPart) -> Iterator[str]:
        """The tensors of a layer beside its codes."""
        for role in (*part.ups, "down"):
            for expert in part.experts:
                names = part.layer.projection(role, expert).names
                yield names.scale
                if self.has(names.input_scale):
                    yield names.input_scale
                if part.layer.biased:
                    yield _bias_name(names.weight)

    def _read(self, item: LayerRead, arena: Memory) -> bool:
        """Read one range to its place in an arena; False when its checksum differs."""
        if not item.run:
            same = self._ranges.fill(item, arena, on_page=True)
            if item.checksum:
                self._progress(item.nbytes)
            return same
        memory = _scratch(item.nbytes)
        self._ranges.fill(item._replace(at=0), memory)
        rows = (item.nbytes - item.run) // item.stride + 1
        columns = memory.tensor.as_strided((rows, item.run), (item.stride, 1))
        arena.tensor[item.at : item.at + rows * item.run].view(rows, item.run).copy_(columns)
        return True


def _input_scales(part: LayerPart, role: Role, floats: Mapping[str, Tensor]) -> Tensor | None:
    """Static input scales, float32 [E]; None where activations are quantized per token."""
    layer, scales = part.layer, []
    for expert in part.experts:
        name = layer.projection(role, expert).names.input_scale
        if name not in floats:
            return None
        scales.append(floats[name].reshape(-1)[0 if layer.layout == "per_expert" else expert])
    return torch.stack(scales).float()


def _scales(part: LayerPart, role: Role, read: Callable[[str], Tensor]) -> Tensor:
    """Scales of the rows of a projection, float32 [E, rows]; a scale per tensor is repeated."""
    return _of_rows(part, role, lambda stored: read(stored.names.scale), lambda stored: stored.scale)


def _biases(part: LayerPart, role: Role, read: Callable[[str], Tensor]) -> Tensor:
    """Biases of a projection, float32 [E, rows]. Outputs of tensor-parallel ranks add up, so one of them has down's."""
    biases = _of_rows(part, role, lambda stored: read(_bias_name(stored.names.weight)), lambda stored: stored.weight)
    return torch.zeros_like(biases) if role == "down" and part.rank.parallel == "tp" and part.rank.rank else biases


def _of_rows(
    part: LayerPart, role: Role, read: Callable[[StoredProjection], Tensor], part_of: Callable[[StoredProjection], Part]
) -> Tensor:
    """The value of each row of a projection, float32 [E, rows]; a single value of an expert is repeated."""
    rows = range(part.layer.hidden) if role == "down" else part.inner
    values = []
    for expert in part.experts:
        stored = part.layer.projection(role, expert)
        of_expert = _part(read(stored).reshape(-1), part_of(stored), alternate=stored.alternate)
        values.append(of_expert[rows.start : rows.stop] if len(of_expert) > 1 else of_expert.expand(len(rows)))
    return torch.stack(values).float()


def _scratch(nbytes: int) -> HostMemory:
    return HostMemory(memoryview(bytearray(max(nbytes, 1))))


def _bias_name(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _part(values: Tensor, part: Part, *, alternate: bool) -> Tensor:
    if alternate and part.of > 1:
        return values.reshape(-1, part.of)[:, part.number]
    size = len(values) // part.of
    return values[part.number * size :][:size]
