"""Where the rows of one expert lie, in each layout, for each kind of scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import load, make_checkpoint, raw

from quarkconv.description.description import Description, describe
from quarkconv.experts.layer import Part
from quarkconv.experts.naming import Role
from quarkconv.plan.experts import ExpertSource, part_of
from quarkconv.plan.pieces import Copy, Piece, Rows, f32_rows

EXPERTS, HIDDEN, INTERMEDIATE = 3, 24, 20
ROLES: tuple[Role, ...] = ("gate", "up", "down")
NAMES = {
    "gate_proj": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "both": "gate_up_proj"},
    "w1": {"gate": "w1", "up": "w3", "down": "w2", "both": "w13"},
}


def read(root: Path, piece: Piece) -> torch.Tensor:
    """The output of a piece, by torch: int8 codes, or F32 scales."""
    tensor, file, start, nbytes = piece.source
    with open(root / file, "rb") as handle:
        handle.seek(start)
        data = bytearray(handle.read(nbytes))
    assert len(data) == nbytes
    if isinstance(piece, Copy):
        return torch.frombuffer(data, dtype=torch.float32 if tensor.endswith("_scale") else torch.int8)
    assert isinstance(piece, Rows)
    dtype = {"": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[piece.widen]
    return torch.frombuffer(data, dtype=dtype).float().repeat(piece.repeat)


def stored(root: Path, layout: str, family: str, role: Role, expert: int, end: str) -> torch.Tensor:
    """The codes ("weight") or a scale of one projection, sliced from the whole tensors."""
    tensors, name = load(root), NAMES[family][role]
    if layout == "per_expert":
        return tensors[f"model.layers.0.mlp.experts.{expert}.{name}.{end}"]
    if layout == "stacked":
        return tensors[f"model.layers.0.moe.{name}.{end}"][expert]
    leaf = name if role == "down" else NAMES[family]["both"]
    suffix = {"weight": "", "weight_scale": "_scale", "input_scale": "_input_scale"}[end]
    tensor = tensors[f"model.layers.0.mlp.experts.{leaf}{suffix}"][expert]
    if role == "down" or tensor.numel() == 1:
        return tensor
    return tensor[:INTERMEDIATE] if role == "gate" else tensor[INTERMEDIATE:]


def sources(description: Description) -> ExpertSource:
    (layer,) = description.int8_layers
    return ExpertSource(layer, description.checkpoint.refs())


@pytest.mark.parametrize("column_scales", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("family", ["gate_proj", "w1"])
@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
def test_pieces_are_the_rows_of_the_expert(
    tmp_path: Path, layout: str, family: str, granularity: str, scale_dtype: torch.dtype, column_scales: bool
) -> None:
    root = make_checkpoint(
        tmp_path / "model", experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, layout=layout, family=family,
        granularity=granularity, scale_dtype=scale_dtype, column_scales=column_scales,
    )  # fmt: skip
    description = describe(root)
    assert description.int8_layers[0].layout == layout
    source = sources(description)
    for role in ROLES:
        rows, inner = (HIDDEN, INTERMEDIATE) if role == "down" else (INTERMEDIATE, HIDDEN)
        assert source.rows(role) == rows
        for expert in range(EXPERTS):
            codes_piece, piece, static = source.part(role, expert)
            codes = read(root, codes_piece)
            assert torch.equal(codes.reshape(rows, inner), stored(root, layout, family, role, expert, "weight"))
            scale = stored(root, layout, family, role, expert, "weight_scale").float().reshape(-1).expand(rows)
            assert piece.output_nbytes == 4 * rows
            assert raw(read(root, piece)) == raw(scale)
            assert static is None
            assert tuple(source.whole(role, expert)) == tuple(source.part(role, expert))


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
def test_static_input_scales_belong_to_their_expert(tmp_path: Path, layout: str) -> None:
    root = make_checkpoint(tmp_path / "model", layout=layout, granularity="per_tensor", input_scales=True)
    source = sources(describe(root))
    values = set()
    for role in ROLES:
        for expert in range(EXPERTS):
            piece = source.part(role, expert).input_scale
            assert piece is not None
            found = read(root, piece)
            assert found.shape == (1,)
            assert found.item() == stored(root, layout, "gate_proj", role, expert, "input_scale").item()
            values.add((role, expert, found.item()))
    assert len({value for _, _, value in values}) == 2 * EXPERTS  # gate and up share theirs


@pytest.mark.parametrize(
    ("dtype", "widen", "per_row", "output"),
    [("F32", "", True, 12), ("BF16", "BF16", True, 12), ("F16", "F16", True, 12), ("F32", "", False, 5 * 12)],
)
def test_a_scale_becomes_f32_rows(dtype: str, widen: str, per_row: bool, output: int) -> None:
    from quarkconv.headers.safetensors import TensorRef

    size = 4 if dtype == "F32" else 2
    ref = TensorRef(dtype, (2, 3), "file", 100, 100 + 6 * size)
    piece = f32_rows(part_of("scale", ref, Part(1, 2)), dtype, 1 if per_row else 5)
    source = Copy("scale", "file", 100 + 3 * size, 3 * size)
    assert piece == (source if dtype == "F32" and per_row else Rows(source, widen, 1 if per_row else 5))
    assert piece.output_nbytes == output
