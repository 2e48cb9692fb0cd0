"""Small checkpoints in memory and on disk, through torch and safetensors' own reader and writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quarkconv.inspection.engine_facts import checked_classes
from support.moe_model import INDEX, Content, MoeModel, TensorSpec, shard_name

Tensors = dict[str, torch.Tensor]

_DTYPES: Final = {"I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


def make_checkpoint(
    folder: Path, *, scale_dtype: torch.dtype = torch.float32, shards: int = 2, seed: int = 0, **fields: Any
) -> Path:
    """Write a small checkpoint with random codes, its tensors spread over shards one by one.

    Args:
        folder: to write to.
        scale_dtype: of weight scales.
        shards: how many files.
        seed: of the random numbers.
        fields: other fields of :class:`MoeModel`.

    Returns:
        ``folder``.
    """
    model = replace(MoeModel(scale_dtype=_NAMES[scale_dtype]), **fields)
    write_checkpoint(folder, fill(model.tensors(), seed), with_class(model.config()), shards)
    return folder


def with_class(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that names the class of its model type which engines were run with, unless it names one itself."""
    types = [found.get(str(config.get("model_type"))) for found in checked_classes().values()]
    classes = sorted(next(filter(None, types), ()))
    return config if "architectures" in config or not classes else config | {"architectures": classes[:1]}


def fill(specs: dict[str, TensorSpec], seed: int = 0) -> Tensors:
    """Tensors with what their specs say that they hold."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _fill(name, spec, generator).to(_DTYPES[spec.dtype]) for name, spec in specs.items()}


def _fill(name: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    match spec.content:
        case Content.CODES:
            return torch.randint(-127, 128, spec.shape, generator=generator, dtype=torch.int8)
        case Content.SCALES:
            return torch.rand(spec.shape, generator=generator) * 1e-2 + 1e-4
        case Content.INPUT_SCALES:  # differs from module to module, and from expert to expert of a stack
            first = sum(map(ord, name.replace("up_proj", "gate_proj").replace("w3", "w1"))) / 1e4
            return torch.arange(spec.shape[0]) / 100 + first if spec.shape else torch.tensor(first)
        case Content.ZEROS:
            return torch.zeros(spec.shape)
        case Content.ONES:
            return torch.ones(spec.shape)
        case Content.NOISE:
            return torch.randn(spec.shape, generator=generator)


def write_checkpoint(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int) -> None:
    """Write tensors, in turn, to ``shards`` files with an index, and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    files = [shard_name(number, shards) for number in range(1, shards + 1)]
    weight_map = {name: files[position % shards] for position, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name].contiguous() for name, owner in weight_map.items() if owner == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def edit_checkpoint(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load(folder)
    change(tensors)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, tensors, config, len(list(folder.glob("*.safetensors"))))


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint, read by the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of every tensor, as the safetensors library reads the headers."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same_tensors(found: Tensors, expected: Tensors) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def float_experts(folder: Path, layout: str = "fused", change: Callable[[Tensors], object] = lambda _: None) -> Path:
    """An export whose config declares everything int8, with its experts in BF16, as Quark 0.13 eager leaves them."""
    root = make_checkpoint(folder, layout=layout, shards=1)
    tensors = load(root)
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if ".experts." in name or ".moe." in name]:
        if name.endswith(("gate.weight", "correction_bias")):
            continue
        if name.endswith("_scale"):
            del tensors[name]
        else:
            tensors[name] = (torch.randn(tensors[name].shape, generator=generator) / 8).bfloat16()
    change(tensors)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    for path in root.glob("model-*.safetensors"):
        path.unlink()
    (root / "model.safetensors.index.json").unlink(missing_ok=True)
    return root
