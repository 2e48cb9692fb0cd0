"""Compare log-probabilities of vLLM with those that `quarkconv evaluate` computes, token by token.

    python benchmarks/evaluate_vllm.py FOLDER [--name evaluate-vllm]

FOLDER holds what `benchmarks/serve/prompt_logprobs.py` wrote: NAME.safetensors for checkpoints of examples/tiny_moe, of
which ``bf16`` is the dequantized model and every other one INT8. Both programs compute in bfloat16, and in other orders
of sums. How much that matters is measured with a third computation, evaluate's own with everything but codes in
float32: a program that computes the same model is as far from it as the other one is. In INT8 that distance is larger,
since a small difference of an activation moves some of its codes by one. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from common import save
from safetensors import safe_open
from torch import Tensor

from quarkconv.description.description import describe
from quarkconv.evaluate.forward import final_logits
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.runners import layer_runners
from quarkconv.evaluate.windows import Windows
from quarkconv.progress import SILENT

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "quark-ptpc_int8"


def streamed(ids: Tensor, dtype: str) -> dict[str, Tensor]:
    """Log-probabilities float64 [W, L - 1, V] of the INT8 and the dequantized model, on the CPU.

    Args:
        ids: int64 [W, L].
        dtype: of everything but codes; experts take and give bfloat16.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        shutil.copytree(EXAMPLE, folder)
        stated = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**stated, "dtype": dtype}), "utf-8")
        runner = layer_runners(describe(folder), None, [torch.device("cpu")], None, stack)[0]
        run = Run([runner], Windows(ids, "vLLM's prompts"), None, SILENT)
        streams = run.layers_of(run.variants, None)
        positions = torch.arange(ids.shape[1] - 1)
        return {
            name: final_logits(runner.quantized.skeleton, ids, streams.states(name), positions).double().log_softmax(-1)
            for name in run.variants
        }


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL divergence of log-probabilities [W, L - 1, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def compared(log_q: Tensor, log_p: Tensor, targets: Tensor) -> dict[str, float]:
    """Distance of two models' log-probabilities [W, L - 1, V]; the KL divergence is that of Q from P."""
    at = targets.unsqueeze(-1)
    target_q, target_p = log_q.gather(-1, at), log_p.gather(-1, at)
    difference = target_q - target_p
    return {
        "kl_mean": divergence(log_p, log_q),
        "top1": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
        "target_mean_difference": difference.mean().item(),
        "target_standard_error": difference.std().item() / math.sqrt(difference.numel()),
        "target_rms_difference": difference.square().mean().sqrt().item(),
        "perplexity": math.exp(-target_q.mean().item()),
        "perplexity_vllm": math.exp(-target_p.mean().item()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="evaluate-vllm", help="of the result")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    served: dict[str, str] = {}
    evaluated: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for file in sorted(options.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            served = dict(handle.metadata() or {})
            ids, found = handle.get_tensor("token_ids"), handle.get_tensor("log_probabilities").double()
        evaluated, exact = evaluated or streamed(ids, "bfloat16"), exact or streamed(ids, "float32")
        variant = "dequantized" if file.stem == "bf16" else "int8"
        distances = {
            name: divergence(exact[variant], item) for name, item in (("evaluate", evaluated[variant]), ("vllm", found))
        }
        rows[file.stem] = {
            "variant": variant, **compared(evaluated[variant], found, ids[:, 1:]), "kl_from_float32": distances
        }  # fmt: skip
        print(file.stem, rows[file.stem])
    if not rows:
        raise SystemExit(f"{options.folder} holds no log-probabilities")
    cost = compared(evaluated["int8"], evaluated["dequantized"], ids[:, 1:])["kl_mean"]
    print(f"INT8 against dequantized, both of evaluate: KL {cost:.3g}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save(options.name, {"served": served, "versions": versions, "int8_cost_kl": cost, "rows": rows})


if __name__ == "__main__":
    main()
