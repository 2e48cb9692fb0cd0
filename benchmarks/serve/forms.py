"""Serve small exports in every form in vLLM on a GPU, and compare what ran with what the export says.

    python benchmarks/serve/forms.py OUT.json [EXPORT...] [--forms quark-original,fused-int8,...] [--no-eager]

The exports are those of tests/data that vLLM has a class for; each is converted here to each form and served in this
process. For every layer of routed experts: vLLM's method and experts, whether each int8 parameter holds the export's
codes and scales bit for bit, and how far the layer's output is from exact W8A8 and from exact W8A16 arithmetic. For
every pair of forms: the largest and the mean difference of all log-probabilities of a prompt of 48 tokens.
QUARKCONV_VLLM=1 serves with our experts; otherwise the dtypes that reach vLLM's Triton kernel are listed too.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_MLA_DISABLE", "1")  # deepseek_v3's kernels need flashinfer

import torch
from engines.expected import WHOLE, Stacked
from engines.forward import exact_experts, relative_error
from engines.vllm.exports import prepare
from support.checkpoints import Tensors, edit_checkpoint
from support.exports import Checkpoints

import quarkconv

ORIGINAL = "quark-original"
FORMS = (ORIGINAL, "fused-int8", "compressed-tensors", "quark", "bf16")
EXPORTS = (
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "qwen3_moe-quark0.11-eager-int8_static",
    "mixtral-quark0.11-eager",
    "minimax_m2-quark0.13-f2f",
    "glm4_moe-0.13-f2f-experts_only",
    "qwen2_moe-0.11-eager-shared_expert",
    "deepseek_v3-quark0.13-f2f",
    "qwen3_5_moe-0.13-f2f-language_model",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {"additional_config": {"gdn_prefill_backend": "triton"}, "language_model_only": True}
}
"""Model type -> options of LLM without which it needs flashinfer, or a tokenizer."""
TOKENS = 48
COMPARED = tuple(f"{half}_weight{scale}" for half in ("w13", "w2") for scale in ("", "_scale"))


class Watch:
    """What layers of routed experts take and give for the prompt, and what reaches vLLM's Triton kernel."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[torch.Tensor, ...]] = {}
        self.kernel: Counter[str] = Counter()

    def wrap_kernel(self) -> None:
        """Look at the arguments of vLLM's kernel from now on."""
        from vllm.model_executor.layers.fused_moe.experts import triton_moe

        original = triton_moe.invoke_fused_moe_triton_kernel

        def invoke(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.kernel[f"{a.dtype} x {b.dtype}".replace("torch.", "")] += 1
            return original(a, b, *args, **kwargs)

        triton_moe.invoke_fused_moe_triton_kernel = invoke

    def wrap_layers(self, model: torch.nn.Module) -> None:
        """Keep the tokens, weights, ids and output of each layer for the prompt."""
        for name, module in routed(model):
            module.quant_method.apply = self._kept(name, module.quant_method.apply)

    def _kept(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(("layer", "x", "topk_weights", "topk_ids"), args, strict=False)) | kwargs
            tokens = [given[key].clone().cpu() for key in ("x", "topk_weights", "topk_ids")]
            out = apply(*args, **kwargs)
            if len(tokens[0]) == TOKENS:
                self.layers.setdefault(name, (*tokens, out.clone().cpu()))
            return out

        return wrapped


def centered(folder: Path) -> Path:
    """Give an export content such that log-probabilities depend on the experts; returns ``folder``.

    What the fixtures leave out of float linears is restored with values between 0.5 and 1.5. Their products grow from
    layer to layer until the experts are lost beside them: here their mean is 0, and their deviation 1 / sqrt(columns).
    """

    def center(tensors: Tensors) -> None:
        for tensor in tensors.values():
            if tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[1] > 1 and tensor.min() >= 0.5:
                tensor.copy_((tensor.float() - 1) * (12 / tensor.shape[1]) ** 0.5)

    edit_checkpoint(folder, center)
    return folder


def routed(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The layers of routed experts of a model of vLLM."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "w13_weight")]


def describe(model: torch.nn.Module, stacked: Stacked) -> dict[str, Any]:
    """Method, experts, and which int8 parameters equal the export, for each layer of routed experts."""
    found = {}
    for name, module in routed(model):
        method = module.quant_method
        kernel = getattr(method, "moe_kernel", None)
        equal = {}
        for key in COMPARED if module.w13_weight.dtype == torch.int8 else ():
            held, expected = getattr(module, key).detach().cpu(), stacked.parameter(f"{name}.{key}", WHOLE)
            if held.numel() != expected.numel():
                expected = stacked.scale_of_parts(f"{name}.{key}", WHOLE)
            same = held.numel() == expected.numel() and torch.equal(held.reshape(expected.shape), expected)
            equal[key] = bool(same)
        found[name] = {
            "method": type(method).__name__,
            "experts": type(getattr(kernel, "fused_experts", None)).__name__,
            "equal_to_export": equal,
        }
    return found


def serve(folder: Path, stacked: Stacked, watch: Watch, static: bool, eager: bool) -> dict[str, Any]:
    """Serve one checkpoint; what ran, and all log-probabilities of the prompt."""
    from vllm import LLM, SamplingParams

    watch.layers.clear()
    watch.kernel.clear()
    vocabulary = stacked.config.get("text_config", stacked.config)["vocab_size"]
    prompt = [(7 * i + 3) % vocabulary for i in range(TOKENS)]
    llm = LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=128, enforce_eager=eager,
        gpu_memory_utilization=0.02, kv_cache_memory_bytes=1 << 27, max_logprobs=vocabulary, disable_log_stats=True,
        **OPTIONS.get(stacked.config["model_type"], {}),
    )  # fmt: skip
    try:
        [layers] = llm.apply_model(lambda model: (describe(model, stacked), watch.wrap_layers(model))[0])
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=vocabulary, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    finally:
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    for name, (x, weights, ids, out) in watch.layers.items():
        if name in layers and layers[name]["equal_to_export"]:
            for key, int8 in (("to_w8a8", True), ("to_w8a16", False)):
                expected = exact_experts(stacked, name, x, weights, ids, static=static, int8=int8)
                layers[name][key] = relative_error(out, expected)
    rows = [[row[token].logprob for token in range(vocabulary)] for row in output.prompt_logprobs[1:]]
    return {"layers": layers, "kernel": dict(watch.kernel), "logprobs": rows}


def compare(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Differences of the log-probabilities for each pair of forms that served."""
    served = {form: torch.tensor(found["logprobs"]) for form, found in results.items() if "logprobs" in found}
    gaps = {f"{a} and {b}": (served[a] - served[b]).abs() for i, a in enumerate(served) for b in list(served)[i + 1 :]}
    return {pair: {"max": float(gap.max()), "mean": float(gap.mean())} for pair, gap in gaps.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("exports", nargs="*", default=EXPORTS)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("forms: needs a GPU, and torch finds none", file=sys.stderr)
        return 4
    watch, exports = Watch(), {}
    head = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "vllm": version("vllm"),
        "torch": str(torch.__version__),
        "eager": options.eager,
    }
    watch.wrap_kernel()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch))
        for name in options.exports:
            source = centered(prepare(checkpoints.copy(name, Path(scratch) / ORIGINAL / name)))
            stacked, results = Stacked(source), {}
            for form in options.forms.split(","):
                folder = Path(scratch) / form / name
                try:
                    if form != ORIGINAL:
                        quarkconv.convert_checkpoint(source, form, folder)
                    results[form] = serve(folder, stacked, watch, "static" in name, options.eager)
                except Exception as error:  # vLLM's reasons to refuse a checkpoint are of every type
                    results[form] = {"error": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]}
                layers = results[form].get("layers", {})
                print(name, form, results[form].get("error") or next(iter(layers.values()), {}), flush=True)
            gaps = compare(results)
            for found in results.values():
                found.pop("logprobs", None)
            exports[name] = {"forms": results, "logprob_differences": gaps}
            options.out.write_text(json.dumps(head | {"exports": exports}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
