"""Checkpoints to convert, made with torch and safetensors, and what converting them must give."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

CONVERTIBLE = (
    "deepseek_v3-quark0.13-f2f",
    "minimax_m2-quark0.13-f2f",
    "mixtral-quark0.11-eager",
    "qwen3_moe-quark0.11-eager-int8_static",
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "step3p5-like-3key_fused",
    "deepseek_v3-0.13-f2f-mtp",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen2_moe-0.11-eager-shared_expert",
    "qwen2_moe-0.13-f2f-shared_expert",
    "qwen3_5_moe-0.13-f2f-language_model",
    "qwen3_moe-0.11-eager-kv_cache_fp8",
    "qwen3_moe-0.11-eager-layer_type",
    "qwen3_moe-0.11-eager-sharded",
    "qwen3_moe-0.11-f2f",
    "qwen3_moe-0.13-f2f-attention_per_tensor",
    "qwen3_moe-0.13-f2f-exclude_patterns_on_disk",
    "qwen3_moe-0.13-f2f-experts_per_projection",
    "qwen3_moe-0.13-f2f-layer_excluded",
    "qwen3_moe-0.13-f2f-re_given_to_quark",
    "qwen3_moe-0.13-f2f-wrapped",
)
"""The exports that can be converted to fused-int8."""

REFUSED = {
    "mixtral-quark0.13-eager-experts_left_bf16": (4, "none of its experts"),
    "qwen3_moe-bf16": (4, "quant-config-missing"),
    "qwen3-0.13-eager-dense": (4, "not-moe"),
    "qwen3-0.13-f2f-dense": (4, "not-moe"),
    "qwen3_5_moe-0.13-f2f-experts_left_3d": (4, "none of its experts"),
    "qwen3_moe-0.11-eager-asymmetric": (4, "scheme-unsupported"),
    "qwen3_moe-0.11-eager-attention_static": (4, "static and dynamic"),
    "qwen3_moe-0.11-eager-channel_weight_static_input": (4, "scheme-unsupported"),
    "qwen3_moe-0.13-f2f-int4_fp8": (4, "scheme-unsupported"),
    "qwen3_moe-0.13-f2f-int8_static_without_input_scale": (3, "scale-missing"),
    "qwen3_moe-0.13-f2f-int8_weight_only": (4, "scheme-unsupported"),
    "qwen3_moe-0.13-f2f-mxfp4_experts": (4, "scheme-unsupported"),
    "qwen3_moe-0.13-f2f-ptpc_fp8": (4, "scheme-unsupported"),
    "qwen3_moe-0.13-f2f-some_experts_excluded": (4, "mixes experts in int8 and in float"),
}
"""The others: exit code, and words of the message."""

_FAMILIES = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])")
_STACKED = re.compile(r"(.+)\.(gate_proj|up_proj|down_proj|w[123])")
_ROLES = {name: role for names in _FAMILIES.values() for role, name in zip(("gate", "up", "down"), names, strict=True)}


def quark_spec(*, weight: bool, granularity: str, dynamic: bool) -> dict[str, Any]:
    """A QTensorConfig as Quark writes it."""
    axis = None if granularity == "per_tensor" else 0 if weight else 1
    return {"dtype": "int8", "qscheme": granularity, "symmetric": True, "ch_axis": axis, "is_dynamic": dynamic}


def make_checkpoint(
    folder: Path,
    *,
    layers: int = 1,
    experts: int = 3,
    hidden: int = 24,
    intermediate: int = 20,
    layout: str = "per_expert",
    family: str = "gate_proj",
    granularity: str = "per_channel",
    scale_dtype: torch.dtype = torch.float32,
    zero_points: bool = False,
    input_scales: bool = False,
    column_scales: bool = False,
    shards: int = 2,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random codes, its tensors spread over shards one by one."""
    random = torch.Generator().manual_seed(seed)
    gate, up, down = _FAMILIES[family]
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.randn(16, hidden, generator=random).bfloat16(),
        "lm_head.weight": torch.randn(16, hidden, generator=random).bfloat16(),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)

    def quantized(weight: str, scale: str, zero_point: str, input_scale: str, *shape: int) -> None:
        tensors[weight] = codes(*shape)
        *lead, out, _ = shape
        size = (*lead, out) if granularity == "per_channel" else tuple(lead)
        if column_scales:
            size = (*size, 1) if granularity == "per_channel" else (*size, 1, 1)
        tensors[scale] = (torch.rand(size, generator=random) * 1e-2 + 1e-4).to(scale_dtype)
        if zero_points:
            tensors[zero_point] = torch.zeros(size, dtype=torch.int8)
        if input_scales:  # gate and up see the same input
            value = float(sum(map(ord, weight.replace(up, gate)))) / 1e4
            tensors[input_scale] = torch.arange(lead[0]) / 100 + value if lead else torch.tensor(value)

    def linear(module: str, *shape: int) -> None:
        weight = f"{module}.weight"
        quantized(weight, f"{weight}_scale", f"{weight}_zero_point", f"{module}.input_scale", *shape)

    for layer in range(layers):
        head = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"{head}.self_attn.{name}", hidden, hidden)
        moe = f"{head}.moe" if layout == "stacked" else f"{head}.mlp"
        tensors[f"{moe}.gate.weight"] = torch.randn(experts, hidden, generator=random).bfloat16()
        if layout == "per_expert":
            for expert in range(experts):
                for name in (gate, up):
                    linear(f"{moe}.experts.{expert}.{name}", intermediate, hidden)
                linear(f"{moe}.experts.{expert}.{down}", hidden, intermediate)
        elif layout == "stacked":
            for name in (gate, up):
                linear(f"{moe}.{name}", experts, intermediate, hidden)
            linear(f"{moe}.{down}", experts, hidden, intermediate)
        else:
            both, last = ("gate_up_proj", "down_proj") if family == "gate_proj" else ("w13", "w2")
            for name, out, inner in ((both, 2 * intermediate, hidden), (last, hidden, intermediate)):
                name = f"{moe}.experts.{name}"
                quantized(name, f"{name}_scale", f"{name}_zero_point", f"{name}_input_scale", experts, out, inner)
    weight_spec = quark_spec(weight=True, granularity=granularity, dynamic=False)
    static = quark_spec(weight=False, granularity="per_tensor", dynamic=False)
    dynamic = quark_spec(weight=False, granularity="per_channel", dynamic=True)
    write_checkpoint(
        folder,
        tensors,
        {
            "model_type": "qwen3_moe",
            "hidden_act": "silu",
            "num_hidden_layers": layers,
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "quantization_config": {
                "quant_method": "quark",
                "version": "0.13",
                "exclude": ["lm_head", "*.gate"],
                "export": {"weight_format": "real_quantized"},
                "layer_quant_config": {},
                "layer_type_quant_config": {},
                "global_quant_config": {"weight": weight_spec, "input_tensors": static if input_scales else dynamic},
            },
        },
        shards,
    )
    return folder


def write_checkpoint(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int) -> None:
    """Write tensors, in turn, to ``shards`` files with an index, and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    weight_map = {name: names[position % shards] for position, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name].contiguous() for name, owner in weight_map.items() if owner == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def edit_checkpoint(folder: Path, change: Callable[[Tensors], None]) -> None:
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


def fused_int8(source: Path) -> Tensors:
    """What fused-int8 makes of a checkpoint: a few lines of torch for each rule."""
    tensors = load(source)
    expected = dict(tensors)
    experts: dict[str, dict[tuple[str, int], str]] = {}
    pieces: Tensors = {}
    for name, weight in tensors.items():
        if not name.endswith(".weight") or weight.dtype != torch.int8:
            continue
        module = name.removesuffix(".weight")
        companions = (".weight", ".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point")
        own = {end: expected.pop(module + end) for end in companions if module + end in tensors}
        scale = own[".weight_scale"].float()
        if match := _EXPERT.fullmatch(module):
            experts.setdefault(match[1], {})[_ROLES[match[3]], int(match[2])] = module
            _split(pieces, module, weight, scale, own.get(".input_scale"))
        elif weight.ndim == 3 and (match := _STACKED.fullmatch(module)):
            for expert in range(len(weight)):
                experts.setdefault(f"{match[1]}.experts", {})[_ROLES[match[2]], expert] = f"{module} {expert}"
                static = own[".input_scale"][expert] if ".input_scale" in own else None
                _split(pieces, f"{module} {expert}", weight[expert], scale[expert], static)
        else:
            expected[name] = weight
            expected[f"{name}_scale"] = scale.reshape(-1, 1).expand(len(weight), 1)
            if ".input_scale" in own:
                expected[f"{module}.input_scale"] = own[".input_scale"]
    for prefix, members in experts.items():
        by_w = next(iter(members.values())).split(" ")[0].rpartition(".")[2].startswith("w")
        both, last = ("w13", "w2") if by_w else ("gate_up_proj", "down_proj")
        count = len(members) // 3
        for end in ("", "_scale", "_input_scale"):
            if members["gate", 0] + end not in pieces:
                continue
            gate, up, down = (
                [pieces[members[role, expert] + end] for expert in range(count)] for role in ("gate", "up", "down")
            )
            halves = [gate[e] if end == "_input_scale" else torch.cat([gate[e], up[e]]) for e in range(count)]
            expected[f"{prefix}.{both}{end}"] = torch.stack(halves)
            expected[f"{prefix}.{last}{end}"] = torch.stack(down)
    return with_engine_names(expected)


def with_engine_names(tensors: Tensors) -> Tensors:
    """Scales of the key-value cache under the names that vLLM's compressed-tensors path knows."""
    return {re.sub(r"\.([kv])_proj\.output_scale$", r".\1_scale", name): tensor for name, tensor in tensors.items()}


def _split(pieces: Tensors, name: str, weight: torch.Tensor, scale: torch.Tensor, static: torch.Tensor | None) -> None:
    pieces[name] = weight
    pieces[f"{name}_scale"] = scale.reshape(-1, 1).expand(len(weight), 1)
    if static is not None:
        pieces[f"{name}_input_scale"] = static.float().reshape(())


def assert_same_tensors(found: Tensors, expected: Tensors) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of every tensor, as the safetensors library reads the headers."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_cli(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Run the program in this process: exit code, stdout, stderr."""
    from quarkconv.cli.main import main

    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit_info:
            main([str(arg) for arg in args])
    finally:
        signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    code = exit_info.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def start(script: str, *args: str | Path) -> subprocess.Popen[str]:
    """Start Python on a script."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
