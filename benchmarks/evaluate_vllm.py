"""Compare log-probabilities of vLLM with those that `quarkconv evaluate` computes, token by token.

    python benchmarks/evaluate_vllm.py FOLDER

FOLDER holds what `benchmarks/serve/prompt_logprobs.py` wrote: NAME.safetensors for checkpoints of examples/tiny_moe, of
which ``bf16`` is the dequantized model and every other one INT8. ``bf16`` shows the noise: both compute the same model
in bfloat16 and differ by the order of sums alone. Writes benchmarks/results/evaluate-vllm.json.
"""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from common import save
from safetensors import safe_open
from torch import Tensor

from quarkconv.description.description import describe
from quarkconv.evaluate.evaluation import layer_runner
from quarkconv.evaluate.forward import final_logits
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.windows import Windows
from quarkconv.progress import SILENT

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "quark-ptpc_int8"


def streamed(ids: Tensor) -> dict[str, Tensor]:
    """Log-probabilities float64 [W, L - 1, V] of the INT8 and the dequantized model, on the CPU."""
    with ExitStack() as stack:
        runner = layer_runner(describe(EXAMPLE), None, torch.device("cpu"), None, stack)
        run = Run([runner], Windows(ids, "vLLM's prompts"), None, SILENT)
        states = run.layers_of(run.variants, None).states
        positions = torch.arange(ids.shape[1] - 1)
        return {
            name: final_logits(runner.quantized.skeleton, ids, tensor, positions).double().log_softmax(-1)
            for name, tensor in states.items()
        }


def compared(mine: Tensor, theirs: Tensor, targets: Tensor) -> dict[str, float]:
    """Distance of two models' log-probabilities [W, L - 1, V]; ``theirs`` is P of the KL divergence."""
    at = targets.unsqueeze(-1)
    own, other = mine.gather(-1, at), theirs.gather(-1, at)
    difference = own - other
    return {
        "kl_mean": (theirs.exp() * (theirs - mine)).sum(-1).mean().item(),
        "top1": (mine.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "target_mean_difference": difference.mean().item(),
        "target_standard_error": difference.std().item() / math.sqrt(difference.numel()),
        "target_rms_difference": difference.square().mean().sqrt().item(),
        "perplexity": math.exp(-own.mean().item()),
        "perplexity_vllm": math.exp(-other.mean().item()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    served: dict[str, str] = {}
    ours: dict[str, Tensor] = {}
    for file in sorted(options.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            served = dict(handle.metadata() or {})
            ids, found = handle.get_tensor("token_ids"), handle.get_tensor("log_probabilities").double()
        ours = ours or streamed(ids)
        variant = "dequantized" if file.stem == "bf16" else "int8"
        rows[file.stem] = {"variant": variant, **compared(ours[variant], found, ids[:, 1:])}
        print(file.stem, rows[file.stem])
    if not rows:
        raise SystemExit(f"{options.folder} holds no log-probabilities")
    cost = compared(ours["int8"], ours["dequantized"], ids[:, 1:])["kl_mean"]
    print(f"INT8 against dequantized, both ours: KL {cost:.3g}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save("evaluate-vllm", {"served": served, "versions": versions, "int8_cost_kl": cost, "rows": rows})


if __name__ == "__main__":
    main()
