"""The float path: logits of the streamed model equal transformers' own forward of the target ``bf16``, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from quarkconv import convert_checkpoint
from quarkconv.description.description import describe
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.weights import CheckpointWeights

FAMILIES = (
    "qwen3_moe-quark0.13-f2f",
    "mixtral-quark0.11-eager",
    "deepseek_v3-quark0.13-f2f",
    "minimax_m2-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
)


def streamed(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V], one layer in memory at a time."""
    skeleton = Skeleton(folder, torch.device("cpu"))
    with ExitStack() as stack:
        weights = stack.enter_context(CheckpointWeights(describe(folder), skeleton))
        skeleton.fill(weights.layer(None).floats, None)
        states, calls = skeleton.embed(ids)
        for number, call in enumerate(calls):
            skeleton.fill(weights.layer(number).floats, skeleton.layer_prefix(number))
            states = skeleton.run_layer(number, states, call)
            skeleton.empty(number)
            assert all(parameter.is_meta for parameter in skeleton.layers[number].parameters())
        return skeleton.logits(ids, states, torch.arange(ids.shape[1]))


def whole(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_dequantized_model_equals_transformers_own_forward_of_the_bf16_target(
    name: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints(name)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    out = convert_checkpoint(source, "bf16", tmp_path / "bf16").output
    assert torch.equal(streamed(source, ids), whole(out, ids))


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "bf16"])
def test_every_layout_of_a_model_gives_the_same_logits(quantized: Path, target: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (1, 12), generator=torch.Generator().manual_seed(2))
    out = convert_checkpoint(quantized, target, tmp_path / target).output
    assert torch.equal(streamed(out, ids), streamed(quantized, ids))


def test_the_unquantized_model_equals_transformers_own_forward(unquantized: Path) -> None:
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(streamed(unquantized, ids), whole(unquantized, ids))
