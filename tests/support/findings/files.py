"""Files that cannot be read, and an index that disagrees with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from support.findings import Case
from support.model import SECOND
from support.moe_model import INDEX
from support.raw import write_json


def truncate(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def break_header(folder: Path) -> None:
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:8] + b"[" + raw[9:])


def edit_index(folder: Path, *, add: dict[str, str] | None = None, drop: str | None = None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(add or {})
    index["weight_map"].pop(drop, None)
    write_json(folder / INDEX, index)


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


CASES: Final = (
    Case("sound", ()),
    Case("sound, deep", (), deep=True),
    Case(
        "no config.json",
        (("error", "config-invalid", "config.json", 1), ("error", "quant-config-missing", "config.json", 1)),
        damage=lambda folder: (folder / "config.json").unlink(),
    ),
    Case(
        "config.json is a list",
        (("error", "config-invalid", "config.json", 1),),
        damage=lambda folder: (folder / "config.json").write_text("[]"),
    ),
    Case("no second shard", (("error", "shard-missing", SECOND, 1),), damage=lambda folder: (folder / SECOND).unlink()),
    Case("weights of PyTorch", (("error", "format-unsupported", "pytorch_model.bin", 1),), damage=pickled),
    Case("truncated shard", (("error", "shard-truncated", SECOND, 1),), damage=truncate),
    Case("header that is not an object", (("error", "header-invalid", SECOND, 1),), damage=break_header),
    Case(
        "index without weight_map",
        (("error", "index-invalid", INDEX, 1),),
        damage=lambda folder: write_json(folder / INDEX, {"metadata": {}}),
    ),
    Case(
        "index that names the wrong file",
        (("error", "index-mismatch", "lm_head.weight", 1),),
        damage=lambda folder: edit_index(folder, add={"lm_head.weight": SECOND}),
    ),
    Case(
        "index that names a tensor that is nowhere",
        (("error", "index-mismatch", "model.new.weight", 1),),
        damage=lambda folder: edit_index(folder, add={"model.new.weight": SECOND}),
    ),
    Case(
        "index that leaves a tensor out",
        (("error", "index-mismatch", "lm_head.weight", 1),),
        damage=lambda folder: edit_index(folder, drop="lm_head.weight"),
    ),
    Case(
        "two tensors in both shards",
        (("error", "tensor-duplicate", "lm_head.weight", 2),),
        lambda model: model.second.update({n: model.first[n].clone() for n in ("lm_head.weight", "model.norm.weight")}),
    ),
    Case(
        "a file that the index does not name",
        (("warning", "file-unused", "extra.safetensors", 1),),
        damage=lambda folder: save_file({"model.extra": torch.ones(1)}, folder / "extra.safetensors"),
    ),
    Case(
        "a file in Mistral's format",
        (("warning", "file-conflict", "consolidated.safetensors", 1),),
        damage=lambda folder: save_file({"model.extra": torch.ones(1)}, folder / "consolidated.safetensors"),
    ),
)
