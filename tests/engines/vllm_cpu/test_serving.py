"""vLLM's CPU backend serves conversions of the trained model of examples/tiny_moe: real logits, without a GPU.

On a CPU with AMX; what its INT8 experts for other CPUs compute is `not checked`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines.expected import Stacked
from engines.forward import exact_experts, relative_error
from support.qwen3_moe_twin import Array, Twin
from tokenizers import Tokenizer

import quarkconv

CPU = Path("/proc/cpuinfo")
pytestmark = pytest.mark.skipif(
    not CPU.exists() or "amx_int8" not in CPU.read_text("utf-8"),
    reason="vLLM's INT8 experts were tested on CPUs with AMX only",
)
EXPORT = Path(__file__).resolve().parents[3] / "examples" / "tiny_moe" / "quark-ptpc_int8"
FORMS = ("fused-int8", "compressed-tensors")
TEXT = (EXPORT.parent / "heldout.txt").read_text("utf-8")
TOKENS = Tokenizer.from_file(str(EXPORT / "tokenizer.json")).encode(TEXT).ids[:128]
ROUNDING = 0.01
"""Of a layer's output, relative: bfloat16 inputs of both products and outputs give 0.6 to 0.8 %."""
DIVERGENCE = 0.0015
"""KL of log-probabilities: that of `quarkconv evaluate` in bfloat16 from float32 (docs/evaluation.md)."""


@dataclass(frozen=True)
class Served:
    """What one form gave.

    Attributes:
        log_probabilities: float64 [L - 1, V], position i for the token after i.
        layers: module -> tokens [M, H], weights [M, K], ids [M, K], output [M, H] of its routed experts.
        methods: module -> the class of vLLM's experts.
    """

    log_probabilities: Array
    layers: dict[str, tuple[torch.Tensor, ...]]
    methods: dict[str, str]


def serve(folder: Path) -> Served:
    """Serve the prompt from a checkpoint, in this process."""
    from vllm import LLM, SamplingParams

    layers: dict[str, tuple[torch.Tensor, ...]] = {}
    methods: dict[str, str] = {}

    def kept(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(("layer", "x", "topk_weights", "topk_ids"), args, strict=False)) | kwargs
            tokens = [given[key].clone() for key in ("x", "topk_weights", "topk_ids")]
            out = apply(*args, **kwargs)
            if len(tokens[0]) == len(TOKENS):
                layers[name] = (*tokens, out.clone())
            return out

        return wrapped

    def watch(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if hasattr(module, "w13_weight"):
                method: Any = module.quant_method
                methods[name] = type(method.moe_kernel.fused_experts).__name__
                method.apply = kept(name, method.apply)

    llm = LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=136, enforce_eager=True,
        max_logprobs=512, disable_log_stats=True, enable_prefix_caching=False,
    )  # fmt: skip
    llm.apply_model(watch)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=512, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": TOKENS}], sampling, use_tqdm=False)
    rows = [[row[token].logprob for token in range(512)] for row in output.prompt_logprobs[1:]]
    del llm
    gc.collect()
    return Served(np.array(rows), layers, methods)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Both forms."""
    folder = tmp_path_factory.mktemp("served")
    return {form: serve(quarkconv.convert_checkpoint(EXPORT, form, folder / form).output) for form in FORMS}


def log_probabilities(twin: Twin) -> Array:
    """Those of a twin for the prompt, float64 [L - 1, V]."""
    logits = twin.logits(np.array([TOKENS]))[0, :-1]
    logits = logits - logits.max(-1, keepdims=True)
    found: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def divergence(p: Array, q: Array) -> float:
    """Mean KL divergence of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("form", [pytest.param(form, id=f"qwen3_moe-{form}") for form in FORMS])
def test_every_layer_of_experts_computes_in_int8(served: dict[str, Served], form: str) -> None:
    stacked, found = Stacked(EXPORT), served[form]
    assert len(found.layers) == len(found.methods) == 4
    assert set(found.methods.values()) == {"CPUExpertsInt8"}
    for name, (x, weights, ids, out) in found.layers.items():
        errors = [
            relative_error(out, exact_experts(stacked, name, x, weights, ids, int8=int8)) for int8 in (True, False)
        ]
        assert errors[0] < ROUNDING < errors[1], name


def test_both_forms_give_the_same_log_probabilities(served: dict[str, Served]) -> None:
    fused, single = (served[form].log_probabilities for form in FORMS)
    assert np.isfinite(fused).all()
    assert np.array_equal(fused, single)


def test_the_log_probabilities_are_those_of_the_export(served: dict[str, Served]) -> None:
    expected, found = log_probabilities(Twin.of(EXPORT, int8=True)), served["fused-int8"].log_probabilities
    assert divergence(expected, found) < DIVERGENCE


def test_one_expert_with_gate_and_up_swapped_is_seen_in_the_log_probabilities(served: dict[str, Served]) -> None:
    twin = Twin.of(EXPORT, int8=True)
    gate, up = (f"model.layers.0.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up"))
    swapped = {gate: up, up: gate, f"{gate}_scale": f"{up}_scale", f"{up}_scale": f"{gate}_scale"}
    tensors = {name: twin.tensors[swapped.get(name, name)] for name in twin.tensors}
    other = log_probabilities(Twin(twin.config, tensors, int8=True))
    assert divergence(other, served["fused-int8"].log_probabilities) > DIVERGENCE
