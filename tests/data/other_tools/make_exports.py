"""Make tiny checkpoints with llm-compressor and auto-round: INT8 weights per channel, activations per token, round to nearest.

Neither is a dependency of the project; each needs a virtual environment of its own:
  pip install llmcompressor==0.14.0.1 torchvision     (transformers 5.17.0, torch 2.14.0, compressed-tensors 0.19.0)
  pip install auto-round==0.16.1 torchvision compressed-tensors==0.20.0     (transformers 5.24.0, torch 2.14.1)
Then: python make_exports.py {llmcompressor|auto_round} {qwen3_moe|glm4_moe|mixtral} OUT_DIR
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=16, num_experts=4
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, intermediate_size=16, num_local_experts=4),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    ),
}  # fmt: skip


def llmcompressor(source: str, out: Path) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier

    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head", "re:.*mlp.gate$"])
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(out, save_compressed=True)


def auto_round(source: str, out: Path) -> None:
    """It wants a tokenizer, writes below ``out``, and cannot load mixtral (0.16.1)."""
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models

    tokens = Tokenizer(models.WordLevel({chr(33 + number): number for number in range(64)}, unk_token="!"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="!", pad_token="!").save_pretrained(source)
    rounding = AutoRound(source, scheme="INT8", iters=0, device_map="cpu", disable_opt_rtn=True)
    with tempfile.TemporaryDirectory() as folder:
        rounding.quantize_and_save(folder, format="llm_compressor")
        (written,) = Path(folder).iterdir()
        shutil.copytree(written, out, ignore=shutil.ignore_patterns("tokenizer*"))


def main(tool: str, family: str, out: str) -> None:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        {"llmcompressor": llmcompressor, "auto_round": auto_round}[tool](source, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
