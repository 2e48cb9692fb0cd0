"""Real exports of Quark, restored from what the repository keeps of them, and which of them can be converted."""

from __future__ import annotations

import json
import lzma
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"

FIXTURES = {
    **{path.name: path for path in sorted((DATA / "fixtures").iterdir()) if path.is_dir()},
    "qwen3_moe-quark0.13-f2f": ROOT / "examples" / "qwen3_moe-quark0.13-f2f",
}
OTHER_TOOLS = {path.name: path for path in sorted((DATA / "other_tools").iterdir()) if path.is_dir()}
EXPORTS = {path.name: path for path in sorted((DATA / "exports").iterdir()) if path.is_dir()}


@cache
def int8_families() -> list[str]:
    """The exports of tests/data/families that have layers in int8; each worker reads them once."""
    from quarkconv.description.description import describe

    folders = sorted(path for path in (DATA / "families").iterdir() if path.is_dir())
    return [path.name for path in folders if describe(path).int8_layers]


Converted = Callable[[str], Path]
"""Name of an export -> the directory of its conversion to fused-int8."""

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
    "mixtral-quark0.13-eager-experts_left_bf16": (4, "its experts are stored in float"),
    "qwen3_moe-bf16": (4, "quant-config-missing"),
    "qwen3-0.13-eager-dense": (4, "not-moe"),
    "qwen3-0.13-f2f-dense": (4, "not-moe"),
    "qwen3_5_moe-0.13-f2f-experts_left_3d": (4, "its experts are stored in float"),
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


def restore(kept: Path, destination: Path) -> Path:
    """Copy an export: decompressed, with zeros as the data of shards of which only the header is kept."""
    shutil.copytree(kept, destination)
    for packed in destination.glob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    for header in destination.glob("*.safetensors.header"):
        raw = header.read_bytes()
        entries = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        data = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        with header.with_suffix("").open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + data)
        header.unlink()
    return destination


class Checkpoints:
    """Restores exports by name, once a session; tests must not write to them (use :meth:`copy`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Path:
        """A shared, read-only copy of the export ``name``."""
        path = self._folder / name
        return path if path.is_dir() else restore((FIXTURES | EXPORTS | OTHER_TOOLS)[name], path)

    def copy(self, name: str, destination: Path) -> Path:
        """A copy of the export ``name`` that the test may change."""
        return restore((FIXTURES | EXPORTS | OTHER_TOOLS)[name], destination)
