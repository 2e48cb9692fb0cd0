"""Small files that cost a naive reader minutes or gigabytes; `benchmarks/hostile.py` measures them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from support.model import Model
from support.moe_model import INDEX
from support.quark_config import quark_config
from support.raw import write_json

TEN_MB = 10_000_000
SINGLE = "model.safetensors"
SHORTEST = '"{}":{{"dtype":"I8","shape":[],"data_offsets":[0,0]}}'
EMPTY_MATRIX = '{{"dtype":"I8","shape":[1,0],"data_offsets":[0,0]}}'


def single(text: str | bytes, data: int = 0) -> Callable[[Path], object]:
    """A model of one file with this header and a hole for data."""

    def write(folder: Path) -> None:
        raw = text if isinstance(text, bytes) else text.encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(folder / SINGLE, 8 + len(raw) + data)

    return write


def entries(count: int, form: str = '"a{}.weight":{{"dtype":"I8","shape":[0,0],"data_offsets":[0,0]}}') -> str:
    """A header of very many tensors."""
    return "{" + ",".join(map(form.format, range(count))) + "}"


def with_config(quantization: object, modules: int) -> Callable[[Path], object]:
    """A model of many linears, and a config to match them against."""
    form = '"' + "model.layers." + "a" * 40 + '{}.weight":{{"dtype":"BF16","shape":[0,0],"data_offsets":[0,0]}}'

    def write(folder: Path) -> None:
        single(entries(modules, form))(folder)
        write_json(folder / "config.json", {**Model().config, "quantization_config": quantization})

    return write


def config(text: str) -> Callable[[Path], object]:
    """A sound model with another config.json."""
    return lambda folder: (Model().write(folder), (folder / "config.json").write_text(text))


def quantized(**changes: object) -> Callable[[Path], object]:
    """A sound model with another quantization_config."""
    return config(json.dumps({"quantization_config": quark_config(**changes)}))


def index(weight_map: dict[str, str]) -> Callable[[Path], object]:
    """A sound model with another index."""
    return lambda folder: (Model().write(folder), write_json(folder / INDEX, {"weight_map": weight_map}))


def index_of(weight_map: str) -> Callable[[Path], object]:
    """A sound model with an index whose weight_map is this text."""
    text = '{"weight_map":' + weight_map + "}"
    return lambda folder: (Model().write(folder), (folder / INDEX).write_text(text))


def nested(opening: str, closing: str) -> str:
    return '{"a":' + opening * (TEN_MB // 2) + closing * (TEN_MB // 2) + "}"


BOMBS: dict[str, Callable[[], Callable[[Path], object]]] = {
    "150,000 tensors of no bytes": lambda: single(entries(150_000)),
    "95,000 tensors in JSON as no tool writes it": lambda: single(entries(95_000).replace('":{', '": {')),
    "1.9 million tensors in 100 MB": lambda: single(entries(1_890_000, SHORTEST)[:99_999_999]),
    "500,000 tensors": lambda: single(entries(500_000)),
    "one tensor of 900,000 dimensions": lambda: single(
        '{"a":{"dtype":"I8","shape":[' + ",".join(["4294967295"] * 900_000) + '],"data_offsets":[0,0]}}'
    ),
    "5,000 dimensions of 2,000 digits": lambda: single(
        '{"a":{"dtype":"I8","shape":[' + ",".join(["9" * 2000] * 5000) + '],"data_offsets":[0,0]}}'
    ),
    "a header of brackets": lambda: single("{" + '"a":' + "[" * TEN_MB),
    "a header of empty lists": lambda: single('{"a":[' + "[]," * (TEN_MB // 3) + "[]]}"),
    "a header of one string": lambda: single('{"__metadata__":{"a":"' + "\N{GRINNING FACE}" * (TEN_MB // 4) + '"}}'),
    "a header of 90 MB of other letters": lambda: (
        single('{"__metadata__":{"a":"' + "\N{GRINNING FACE}" * 22_500_000 + '"}}')
    ),
    "a header of quotation marks": lambda: single("{" + '"' * TEN_MB),
    "a config of empty lists": lambda: config('{"a":[' + "[]," * (TEN_MB // 3) + "[]]}"),
    "a config of objects": lambda: config('{"a":[' + '{"":0},' * (TEN_MB // 7) + "0]}"),
    "a config of 31 MB of objects": lambda: config('{"a":[' + '{"":0},' * (31_000_000 // 7) + "0]}"),
    "an index of 90 MB of the shortest names": lambda: (
        index_of("{" + ",".join(map('"{:x}":""'.format, range(7_000_000))) + "}")
    ),
    "a config of brackets": lambda: config(nested("[", "]")),
    "a config of 900,000 layers": lambda: quantized(layer_quant_config={f"m{i}": 0 for i in range(900_000)}),
    "a config of 100,000 layers": lambda: (
        quantized(layer_quant_config={f"model.layers.{i}": {} for i in range(100_000)})
    ),
    "a config of names": lambda: quantized(exclude=[f"m{i}" for i in range(900_000)]),
    "an index of 300,000 shards": lambda: index({f"t{i}": f"{i}.safetensors" for i in range(300_000)}),
    "an index of 350,000 tensors": lambda: index({f"{i}": "a.safetensors" for i in range(350_000)}),
    "an expression that never ends": lambda: with_config(quark_config(exclude=[r"re:(\w|[a-z.]|..)*[!?]"]), 60_000),
    "2,000 fnmatch patterns": lambda: with_config(quark_config(exclude=[f"*a*a*{i}*b" for i in range(2000)]), 60_000),
    "300,000 fnmatch patterns of the simplest kind": lambda: with_config(
        quark_config(exclude=[f"*{i}" for i in range(300_000)]), 60_000
    ),
    "2,000 layers by patterns": lambda: with_config(
        quark_config(layer_quant_config={f"*a*{i}*b": None for i in range(2000)}), 60_000
    ),
    "60,000 layers of one expert each": lambda: single(
        entries(60_000, '"model.layers.{}.mlp.experts.1.gate_proj.weight":' + EMPTY_MATRIX)
    ),
}  # fmt: skip
"""Name -> a function that builds the writer; built on demand, since some are large."""
