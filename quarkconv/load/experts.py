"""Loading the experts of a checkpoint, in whatever layout they are stored.

Tensors are read with safetensors, and stacked with torch: nothing here knows how a conversion moves bytes, so that
what it moved can be compared with what is loaded here.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quarkconv.description.description import Description, describe
from quarkconv.errors import SourceError, UnsupportedError, UsageError
from quarkconv.experts.naming import ROLES, Role
from quarkconv.experts.ranks import WHOLE, Rank, make_rank
from quarkconv.experts.topology import MoELayer
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.hub.locate import resolve_model
from quarkconv.load.devices import pick_device

Index = tuple[int | slice, ...]
"""Which part of a tensor, along its first dimensions."""


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """The routed experts of one layer, as :func:`quarkconv.kernels.fused_experts_int8` takes them.

    E experts, hidden size H, intermediate size I.

    Attributes:
        layer: number of the layer.
        prefix: module of the experts.
        w13: int8 [E, 2I, H]; rows 0..I-1 are gate, rows I..2I-1 up.
        w13_scale: float32 [E, 2I, 1].
        w2: int8 [E, H, I].
        w2_scale: float32 [E, H, 1].
        w13_input_scale, w2_input_scale: float32 [E], or None where activations are quantized per token.
    """

    layer: int
    prefix: str
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.w2.shape[2]

    def projection(self, role: Role, expert: int) -> Projection:
        """One projection of one expert, as views."""
        inner = self.intermediate_size
        codes, scale, static = self.w13[expert], self.w13_scale[expert], self.w13_input_scale
        if role == "down":
            codes, scale, static = self.w2[expert], self.w2_scale[expert], self.w2_input_scale
        else:
            rows = slice(0, inner) if role == "gate" else slice(inner, 2 * inner)
            codes, scale = codes[rows], scale[rows]
        return Projection(codes, scale.reshape(-1), None if static is None else static[expert])

    def part(self, rank: Rank) -> FusedExperts:
        """What a rank has of them: experts as views, parts of the intermediate size as copies."""
        if rank.is_whole:
            return self
        inner = self.intermediate_size
        experts, columns = rank.experts(self.experts), rank.intermediate(inner)
        some, half = slice(experts.start, experts.stop), slice(columns.start, columns.stop)
        whole = len(columns) == inner

        def rows(tensor: Tensor) -> Tensor:
            return (
                tensor[some] if whole else torch.cat([tensor[some, :inner][:, half], tensor[some, inner:][:, half]], 1)
            )

        w2 = self.w2[some] if whole else self.w2[some, :, half].contiguous()
        static = [None if scale is None else scale[some] for scale in (self.w13_input_scale, self.w2_input_scale)]
        return FusedExperts(
            self.layer, self.prefix, rows(self.w13), rows(self.w13_scale), w2, self.w2_scale[some], *static
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> FusedExperts:
        """The same on a device."""
        tensors = (self.w13, self.w13_scale, self.w2, self.w2_scale, self.w13_input_scale, self.w2_input_scale)
        moved = [None if tensor is None else tensor.to(device, non_blocking=non_blocking) for tensor in tensors]
        return FusedExperts(self.layer, self.prefix, *moved)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        tensors = (self.w13, self.w13_scale, self.w2, self.w2_scale, self.w13_input_scale, self.w2_input_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection of one expert: codes int8 [out, in], a scale per row float32 [out], and a static input scale."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def dequantized(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight [out, in] in ``dtype``: code times scale."""
        return self.codes.to(device).to(dtype) * self.scale.to(device).to(dtype).unsqueeze(1)

    def to(self, device: torch.device) -> Projection:
        """The same on a device."""
        moved = None if self.input_scale is None else self.input_scale.to(device)
        return Projection(self.codes.to(device), self.scale.to(device), moved)


class ExpertReader:
    """Reads the experts of a described checkpoint. A context manager: it keeps the files open that it has read from."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self._places = {name: shard.file for shard in description.checkpoint.shards for name in shard.names}
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ExpertReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self._places

    def tensor(self, name: str, part: Index | None = None) -> Tensor:
        """A tensor on the CPU, or a part of it; only that is read.

        Raises:
            SourceError: its file cannot be read.
        """
        file = self._places[name]
        try:
            if file not in self._files:
                path = self.description.checkpoint.root / file
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            handle = self._files[file]
            tensor: Tensor = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        except Exception as error:  # safetensors raises its own type for headers, OSError for the rest
            raise SourceError(
                "A tensor cannot be read", code="shard-truncated", file=file, tensor=name, found=str(error)[:200]
            ) from error
        return tensor

    def projection(self, layer: MoELayer, role: Role, expert: int, part: range | None = None) -> Projection:
        """One projection of one expert, whatever the layout of its layer.

        Args:
            layer, role, expert: which one.
            part: the part of the intermediate size that is read: rows of gate and up, columns of down; None for all.
        """
        names = layer.projection(role, expert).names
        inner = layer.intermediate
        part = part or range(inner)
        first = inner if layer.layout == "fused" and role == "up" else 0
        rows, columns = slice(first + part.start, first + part.stop), slice(None)
        if role == "down":
            rows, columns = slice(None), slice(part.start, part.stop)
        lead = () if layer.layout == "per_expert" else (expert,)
        codes = self.tensor(names.weight, (*lead, rows, columns))
        scale = self.tensor(names.scale, lead or None).float().reshape(-1)
        static = names.input_scale
        input_scale = self.tensor(static, lead or None).float().reshape(()) if self.has(static) else None
        return Projection(codes, (scale[rows] if len(scale) > 1 else scale).expand(len(codes)), input_scale)

    def fused(self, layer: MoELayer, device: torch.device, rank: Rank = WHOLE) -> FusedExperts:
        """What a rank has of the experts of a layer, on a device; no second copy of them is made."""
        numbers, part = rank.experts(layer.experts), rank.intermediate(layer.intermediate)
        experts, hidden, inner = len(numbers), layer.hidden, len(part)
        w13 = torch.empty(experts, 2 * inner, hidden, dtype=torch.int8, device=device)
        w2 = torch.empty(experts, hidden, inner, dtype=torch.int8, device=device)
        w13_scale = torch.empty(experts, 2 * inner, 1, dtype=torch.float32, device=device)
        w2_scale = torch.empty(experts, hidden, 1, dtype=torch.float32, device=device)
        input_scales: dict[Role, list[Tensor]] = {role: [] for role in ROLES}
        for expert, number in enumerate(numbers):
            for role in ROLES:
                projection = self.projection(layer, role, number, part)
                codes, scales = (w2, w2_scale) if role == "down" else (w13, w13_scale)
                rows = slice(inner, 2 * inner) if role == "up" else slice(0, len(projection.scale))
                codes[expert, rows] = projection.codes.to(device)
                scales[expert, rows, 0] = projection.scale.to(device)
                if projection.input_scale is not None:
                    input_scales[role].append(projection.input_scale)
        return FusedExperts(
            layer.index, layer.prefix, w13, w13_scale, w2, w2_scale,
            _stacked(input_scales["gate"], experts, device), _stacked(input_scales["down"], experts, device),
        )  # fmt: skip


def load_fused_experts(
    model: str | Path,
    layer: int,
    device: str | torch.device = "cpu",
    *,
    rank: int = 0,
    world_size: int = 1,
    parallel: str = "tp",
) -> FusedExperts:
    """Load the routed experts of one layer, stacked, from any INT8 MoE checkpoint.

    With a ``world_size``, only the part of one rank is read: of a whole checkpoint, or of a directory that was
    converted by rank in the same way.

    Args:
        model: directory or Hub repo id of a Quark export or of a converted checkpoint.
        layer: number of the layer.
        device: where the tensors go.
        rank, world_size: which of how many ranks.
        parallel: ``tp`` for tensor parallel, ``ep`` for expert parallel.

    Raises:
        SourceError: the checkpoint cannot be read.
        UsageError: it has no MoE layer of that number, there is no such device or rank, or the checkpoint is divided
            in another way.
        UnsupportedError: the layer's experts are not int8, or cannot be divided so.
    """
    place = pick_device(device)
    requested = make_rank(parallel, rank, world_size)
    root = resolve_model(model)
    if not requested.is_whole and (root / RANKS_NAME).is_file():
        root = root / requested.folder()
    description = describe(root)
    stored = description.config.rank
    if not requested.is_whole and not stored.is_whole and stored != requested:
        raise UsageError(
            "The checkpoint is divided among ranks in another way", file=str(root), expected=str(requested.to_json()),
            found=str(stored.to_json()),
        )  # fmt: skip
    found = next((item for item in description.moe_layers if item.index == layer), None)
    if found is None:
        have = ", ".join(str(item.index) for item in description.moe_layers) or "none"
        raise UsageError("There is no such MoE layer", file=str(model), expected=f"one of {have}", found=str(layer))
    check_loadable(found)
    part = requested if stored.is_whole else WHOLE
    part.check(found.prefix, found.experts, found.intermediate)
    with ExpertReader(description) as reader:
        return reader.fused(found, place, part)


def check_loadable(layer: MoELayer) -> None:
    """Refuse a layer that cannot be loaded as int8 experts.

    Raises:
        UnsupportedError: its weights are not int8, or a scale is missing or of a wrong shape.
    """
    if not layer.quantized or any(form.granularity is None for form in layer.all_forms):
        raise UnsupportedError(
            "The experts of this layer are not stored in int8 with scales", tensor=layer.prefix,
            found="/".join(sorted({form.weight.dtype for form in layer.all_forms})),
            hint="run `quarkconv inspect`",
        )  # fmt: skip


def _stacked(scales: list[Tensor], experts: int, device: torch.device) -> Tensor | None:
    return torch.stack(scales).to(device) if len(scales) == experts else None
