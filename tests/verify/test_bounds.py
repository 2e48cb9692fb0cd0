"""The bounds of verify: no false alarm for any seed, and every planted fault of a kernel is found.

Six seeds here; ``pytest tests/verify/test_bounds.py --seeds 200`` takes as many as you like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.exports import DATA, Checkpoints
from torch import Tensor

import quarkconv
from quarkconv.description.description import describe
from quarkconv.experts.function import ExpertActivation
from quarkconv.experts.knowledge import expert_activation
from quarkconv.kernels import fused_experts_int8
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify import numbers
from quarkconv.verify.layer_results import LayerNumbers
from quarkconv.verify.numbers import CheckedLayer, compute_numbers
from quarkconv.verify.router import router_of

pytestmark = pytest.mark.long(15)

EXPORTS = [
    "qwen3_moe-quark0.13-f2f",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "mixtral-quark0.11-eager",
    "step3p5-like-3key_fused",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "qwen3_moe-quark0.11-eager-int8_static",
]
FAMILIES = DATA / "families"
EVERY = [*EXPORTS, *sorted(path.name for path in FAMILIES.glob("*-eager")), "gemma4-0.13-f2f"]
"""Those, and an export of every family."""


def checked_layers(model: Path) -> Iterator[CheckedLayer]:
    """The layers of a checkpoint, ready to be computed."""
    description = describe(model)
    with ThreadPoolExecutor(2) as pool, LayerReader(description, pool) as reader:
        for layer in description.int8_layers:
            activation = expert_activation(description.config.raw, layer)
            assert isinstance(activation, ExpertActivation)
            experts = quarkconv.load_fused_experts(model, layer.prefix)
            router = router_of(layer, description.config.raw, reader)
            yield CheckedLayer(layer, experts, activation, description.config.top_k, router)


def computed(layer: CheckedLayer, seed: int, tokens: int = 64) -> LayerNumbers:
    return compute_numbers(layer, tokens=tokens, seed=seed, recorded=None)[0]


def ratios(result: LayerNumbers) -> dict[str, float]:
    distances = {"exact": result.exact, "dequantized": result.dequantized, "outliers": result.outliers}
    return {name: item.relative_error / item.bound for name, item in distances.items() if item is not None}


@pytest.mark.parametrize("name", EVERY)
def test_no_seed_gives_a_false_alarm(name: str, checkpoints: Checkpoints, seeds: range) -> None:
    worst: dict[str, float] = {}
    family = FAMILIES / name
    for layer in checked_layers(family if family.is_dir() else checkpoints(name)):
        for seed in seeds:
            result = computed(layer, seed)
            assert result.ok, (layer.layer.prefix, seed, result)
            worst |= {key: max(value, worst.get(key, 0.0)) for key, value in ratios(result).items()}
    assert worst
    print(f"{name}: largest share of the bound over {len(seeds)} seeds:", worst)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 16), (64, 32), (256, 48)])
def test_small_sizes_and_few_tokens_hold_as_well(
    hidden: int, intermediate: int, tokens: int, tmp_path: Path, seeds: range
) -> None:
    model = make_checkpoint(tmp_path / "model", experts=4, hidden=hidden, intermediate=intermediate, column_scales=True)
    layer = silu_layer(model)
    for seed in seeds:
        result = computed(layer, seed, tokens)
        assert result.ok, (seed, result)


def silu_layer(model: Path) -> CheckedLayer:
    """The one layer of a made checkpoint, with SiLU whatever its config says."""
    description = describe(model)
    layer = description.int8_layers[0]
    with ThreadPoolExecutor(2) as pool, LayerReader(description, pool) as reader:
        router = router_of(layer, description.config.raw, reader)
    return CheckedLayer(layer, quarkconv.load_fused_experts(model, 0), ExpertActivation("silu"), 2, router)


Forward = Callable[..., Tensor]


def without_rounding_h(_: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """h goes to its codes in float32: a forward that leaves the first rounding out."""
    return _forward(*arguments, **options, round_h=False)


def without_rounding_outputs(_: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Outputs of experts are summed in float32."""
    return _forward(*arguments, **options, round_y=False)


def with_seven_bits(_: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Activations in 7 bits."""
    return _forward(*arguments, **options, largest=63)


def with_scales_of_the_next_row(forward: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    states, w13, w2, w13_scale, *rest = arguments
    return forward(states, w13, w2, w13_scale.roll(1, 1), *rest, **options)


def with_gate_and_up_exchanged(forward: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    states, w13, w2, w13_scale, *rest = arguments
    half = w13.shape[1] // 2
    return forward(states, w13.roll(half, 1), w2, w13_scale.roll(half, 1), *rest, **options)


def without_the_last_expert(forward: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The choice of least weight is dropped."""
    *first, weights, ids = arguments
    last = torch.full_like(ids[:, -1:], -1)
    return forward(*first, weights, torch.cat([ids[:, :-1], last], 1), **options)


def with_one_wrong_element(forward: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    result = forward(*arguments, **options).clone()
    result[len(result) // 2, 3] += result.abs().amax()
    return result


def _forward(
    states: Tensor, w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor, weights: Tensor, ids: Tensor, *,
    round_h: bool = True, round_y: bool = True, largest: int = 127, **options: Any,
) -> Tensor:  # fmt: skip
    """The INT8 forward of SiLU experts under dynamic scales in a few lines, with faults to switch on."""
    assert options["activation"] == "silu"
    assert options["w13_input_scale"] is None

    def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        step = (x.abs().amax(1, keepdim=True) / largest).clamp(min=1e-30)
        return (torch.round(x / step) @ codes.double().T) * step * scale.double().T

    result = torch.zeros_like(states, dtype=torch.float64)
    for expert in range(len(w13)):
        tokens, slots = torch.nonzero(ids == expert, as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up = product(states[tokens].double(), w13[expert], w13_scale[expert]).chunk(2, 1)
        h = gate * torch.sigmoid(gate) * up
        y = product(h.to(states.dtype).double() if round_h else h, w2[expert], w2_scale[expert])
        y = y.to(states.dtype).double() if round_y else y
        result.index_add_(0, tokens, weights[tokens, slots].double().unsqueeze(1) * y)
    return result.to(states.dtype)


FAULTS = [
    without_rounding_h, without_rounding_outputs, with_seven_bits, with_scales_of_the_next_row,
    with_gate_and_up_exchanged, without_the_last_expert, with_one_wrong_element,
]  # fmt: skip
DYNAMIC = ["qwen3_moe-quark0.13-f2f", "minimax_m2-quark0.13-f2f", "deepseek_v3-quark0.13-f2f"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", DYNAMIC)
def test_every_planted_fault_is_found(
    name: str, fault: Callable[..., Tensor], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = fused_experts_int8

    def faulty(*arguments: Any, **options: Any) -> Tensor:
        return fault(forward, arguments, options)

    monkeypatch.setattr(numbers, "fused_experts_int8", faulty)
    layer = next(checked_layers(checkpoints(name)))
    for seed in range(3):
        result = computed(layer, seed)
        assert not result.ok, (fault.__name__, seed, ratios(result))


def test_the_forward_that_faults_are_planted_in_is_right_without_them(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "fused_experts_int8", _forward)
    layer = next(checked_layers(checkpoints(DYNAMIC[0])))
    assert all(computed(layer, seed).ok for seed in range(3))


def test_a_bound_is_the_base_where_float32_decides_nothing(checkpoints: Checkpoints) -> None:
    layer = next(checked_layers(checkpoints(DYNAMIC[0])))
    bounds = sorted(computed(layer, seed).exact.bound for seed in range(5))
    assert 2**-11 <= bounds[0] < 2**-10.5
    assert all(math.isfinite(bound) for bound in bounds)
