"""Exports of language models below the names of the models that have an image encoder beside them.

The image encoder is left out: engines serve such models with ``--language-model-only``, or build an encoder whose
parameters no test looks at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from support.checkpoints import load
from support.exports import DATA

_ENCODER: Final = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
_VISION_SIZES: Final = {
    **_ENCODER, **{f"vt_{key}": size for key, size in _ENCODER.items()}, "mm_hidden_size": 16, "text_hidden_size": 16,
    "patch_size": 4, "init_pos_emb_height": 2, "init_pos_emb_width": 2, "merge_kernel_size": [2, 2],
}  # fmt: skip


@dataclass(frozen=True)
class Wrapped:
    """A model around the language model of an export.

    Attributes:
        export: the export in tests/data/families.
        prefix: what the names of its tensors begin with here, and what with there.
        config: config.json without the language model.
        part: key of the language model's config.
        fields: fields of that, beside those of the export.
        beside: tensors beside the language model in BF16: name -> shape.
    """

    export: str
    prefix: tuple[tuple[str, str], ...]
    config: dict[str, Any]
    part: str = "text_config"
    fields: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns ``folder``."""
        source = DATA / "families" / self.export
        text = json.loads((source / "config.json").read_text())
        quantization = text.pop("quantization_config")
        quantization["exclude"] = list(map(self._name, quantization["exclude"]))
        config = {**self.config, self.part: text | self.fields, "quantization_config": quantization}
        tensors = {self._name(name): tensor for name, tensor in load(source).items()}
        tensors |= {name: torch.rand(shape).bfloat16() for name, shape in self.beside.items()}
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _name(self, name: str) -> str:
        for stored, wrapped in self.prefix:
            if name.startswith(stored):
                return wrapped + name.removeprefix(stored)
        return name


WRAPPED: Final = {
    "deepseek_vl_v2": Wrapped(
        "deepseek_v2-0.13-f2f", (("", "language."),),
        {"model_type": "deepseek_vl_v2", "architectures": ["DeepseekVLV2ForCausalLM"], "tile_tag": "2D",
         "torch_dtype": "bfloat16", "vision_config": {"model_type": "vision"},
         "projector_config": {"model_type": "mlp_projector", "n_embed": 16}},
        part="language_config", beside={"image_newline": (16,), "view_seperator": (16,)},
    ),
    "kimi_k25": Wrapped(
        "deepseek_v3-0.13-f2f", (("", "language_model."),),
        {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "dtype": "bfloat16",
         "vision_config": _VISION_SIZES},
        fields={"model_type": "kimi_k2", "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    ),
    "qwen4_exp_vl": Wrapped(
        "qwen4_exp-0.13-f2f", (("model.", "model.language_model."),),
        {"model_type": "qwen4_exp", "architectures": ["Qwen4ExpForConditionalGeneration"], "dtype": "bfloat16",
         "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4,
                           "out_hidden_size": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": []}},
        fields={"indexer_budget": 1024},
    ),
}  # fmt: skip
"""Family -> its checkpoint."""
