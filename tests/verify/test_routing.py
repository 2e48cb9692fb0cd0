"""Routing against goldens of the models' own blocks (tests/data/routing/make_goldens.py) and worked examples."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from support.routing import CASES, EXPORTED, golden_routing, routing_from_config

from quarkconv.experts.families import FAMILIES
from quarkconv.experts.function import Routing
from quarkconv.experts.knowledge import knowledge
from quarkconv.experts.router_tensors import router_tensor_names
from quarkconv.verify.routing import RouterExtras, route, uniform_routing

DATA = Path(__file__).parents[1] / "data" / "routing"
TENSORS = load_file(DATA / "goldens.safetensors")

# Both sides compute in float32 from the same inputs; what may differ is the order in which the 16-term dot products are
# summed: an error of a few 1e-7 in logits of order 1, which softmax and sigmoid do not enlarge.
TOLERANCE = 2e-6
# The family that caps its logits has them of order 10, with errors ten times as large.
TOLERANCES = {"grok-2": 2e-5}


def extras(name: str) -> RouterExtras:
    return RouterExtras(*(TENSORS.get(f"{name}.{field}") for field in RouterExtras._fields))


def routed(name: str, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (TENSORS[f"{name}.hidden_states"], TENSORS[f"{name}.weight"], TENSORS.get(f"{name}.bias"))
    return route(routing, *tensors, extras(name))


def without_zero_experts(topk_ids: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The ids of a model's own router, with -1 for experts without weights, as route() returns them."""
    return topk_ids.masked_fill(topk_ids >= routing.experts, -1)


def by_expert(topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: int) -> torch.Tensor:
    """[M, E] weights with 0 where unchosen: equal for any order of the k. Those of experts without weights are left."""
    chosen = torch.zeros(len(topk_ids), experts + 1)
    return chosen.scatter(-1, topk_ids.where(topk_ids >= 0, experts).clamp(max=experts), topk_weights)[:, :experts]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_models_own_block(name: str) -> None:
    routing = golden_routing(name)
    topk_weights, topk_ids = routed(name, routing)
    expected_weights, expected_ids = TENSORS[f"{name}.topk_weights"], TENSORS[f"{name}.topk_ids"]

    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype == torch.int64
    assert topk_ids.shape == (len(expected_ids), routing.top_k)
    if routing.zero_experts:
        assert (expected_ids >= routing.experts).any()
    expected_ids = without_zero_experts(expected_ids, routing)
    assert torch.equal(topk_ids.sort(-1).values, expected_ids.sort(-1).values)
    tolerance = TOLERANCES.get(name, TOLERANCE)
    torch.testing.assert_close(
        by_expert(topk_weights, topk_ids, routing.experts),
        by_expert(expected_weights, expected_ids, routing.experts),
        rtol=tolerance,
        atol=tolerance,
    )


def test_every_row_has_a_golden_or_a_loop() -> None:
    rows = {knowledge(case["config"]).family.source for case in CASES.values()}  # type: ignore[union-attr]
    assert {row.types for row in FAMILIES if row.source not in rows} == {("grok-1",)}  # that one has a loop


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt_oss", {"scoring": "sigmoid"}),
        ("llama4", {"by_logits": False, "scoring": "softmax"}),
        ("deepseek_v4", {"scoring": "sigmoid"}),
        ("phimoe", {"jitter": 0.01}),
        ("dbrx", {"norm_order": 2.0}),
        ("dbrx-2_norm", {"norm_order": 1.0}),
        ("gemma4", {"input_norm": None}),
        ("lfm2_moe", {"scaling_factor": 1.0}),
        ("minimax_m3", {"scaling_factor": 1.0}),
        ("grok-2", {"softcap": None}),
        ("longcat_flash", {"renormalize": True}),
        ("jamba", {"renormalize": True}),
        ("granitemoehybrid", {"by_logits": False}),
    ],
)
def test_goldens_depend_on_every_step(name: str, change: dict[str, Any]) -> None:
    routing = golden_routing(name)
    right, wrong = routed(name, routing), routed(name, routing._replace(**change))
    rows = [by_expert(*pair, routing.experts) for pair in (right, wrong)]
    assert (rows[0] - rows[1]).abs().max() > 100 * TOLERANCES.get(name, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "field"), [("gpt_oss", "logit_bias"), ("gemma4", "input_scale"), ("gemma4", "expert_scale")]
)
def test_goldens_depend_on_every_tensor(name: str, field: str) -> None:
    routing, tensors = golden_routing(name), extras(name)
    neutral = torch.zeros_like if field == "logit_bias" else torch.ones_like
    changed = tensors._replace(**{field: neutral(getattr(tensors, field))})
    right = routed(name, routing)
    wrong = route(routing, TENSORS[f"{name}.hidden_states"], TENSORS[f"{name}.weight"], None, changed)
    assert not torch.allclose(by_expert(*right, routing.experts), by_expert(*wrong, routing.experts), atol=1e-3)


# Otherwise a golden that a missing step also satisfies would prove nothing about that step.
@pytest.mark.parametrize("name", [name for name in CASES if f"{name}.bias" in TENSORS])
def test_goldens_depend_on_the_bias(name: str) -> None:
    routing = golden_routing(name)._replace(bias_name=None)
    _, topk_ids = route(routing, TENSORS[f"{name}.hidden_states"], TENSORS[f"{name}.weight"])
    assert not torch.equal(topk_ids.sort(-1).values, TENSORS[f"{name}.topk_ids"].sort(-1).values)


@pytest.mark.parametrize("change", [{"n_group": 1, "topk_group": 1}, {"group_score": "max"}, {"group_score": "top2"}])
@pytest.mark.parametrize("name", ["deepseek_v2-groups", "deepseek_v3", "deepseek_v3-not_renormalised", "glm4_moe"])
def test_goldens_depend_on_the_groups(name: str, change: dict[str, Any]) -> None:
    routing = golden_routing(name)
    changed = routing._replace(**change)
    same = torch.equal(routed(name, routing)[1].sort(-1).values, routed(name, changed)[1].sort(-1).values)
    assert same == (changed == routing)


@pytest.mark.parametrize("renormalize", [True, False])
def test_step3p5_routes_as_a_loop_over_tokens_does(renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden_states, weight = torch.randn(7, 16, generator=generator), torch.randn(6, 16, generator=generator) * 0.4
    bias = torch.randn(6, generator=generator)
    config = {**EXPORTED["step3p5-like-3key_fused"], "norm_expert_weight": renormalize}
    routing = routing_from_config(config, 6)
    assert routing is not None

    topk_weights, topk_ids = route(routing, hidden_states, weight, bias)

    for token in range(7):
        scores = [1 / (1 + math.exp(-math.fsum((hidden_states[token] * row).tolist()))) for row in weight]
        chosen = sorted(range(6), key=lambda expert: scores[expert] + bias[expert].item(), reverse=True)[:2]
        total = sum(scores[expert] for expert in chosen) if renormalize else 1.0
        assert topk_ids[token].tolist() == chosen
        assert topk_weights[token].tolist() == pytest.approx([3.0 * scores[e] / total for e in chosen], rel=TOLERANCE)


def test_grok_1_routes_as_a_loop_over_tokens_does() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden_states, weight = torch.randn(7, 16, generator=generator), torch.randn(6, 16, generator=generator) * 0.4
    routing = routing_from_config({"model_type": "grok-1", "num_experts": 6, "num_experts_per_tok": 2}, 6)
    assert routing is not None

    topk_weights, topk_ids = route(routing, hidden_states, weight)

    for token in range(7):
        powers = [math.exp(math.fsum((hidden_states[token] * row).tolist())) for row in weight]
        chosen = sorted(range(6), key=lambda expert: powers[expert], reverse=True)[:2]
        assert topk_ids[token].tolist() == chosen
        expected = [powers[expert] / math.fsum(powers) for expert in chosen]
        assert topk_weights[token].tolist() == pytest.approx(expected, rel=TOLERANCE)


def logit(score: float) -> float:
    return math.log(score / (1 - score))


# Hidden states [1, 1] of one 1.0 make the weight column the logits. Six experts, three groups of two:
#   scores        0.9 0.1 | 0.6 0.5 | 0.7 0.2
#   top2 sums       1.0   |   1.1   |   0.9
#   maxima          0.9   |   0.6   |   0.7
SCORES = [0.9, 0.1, 0.6, 0.5, 0.7, 0.2]


@pytest.mark.parametrize(
    ("group_score", "topk_group", "bias", "chosen"),
    [
        ("top2", 1, [0.0] * 6, [2, 3]),
        ("top2", 2, [0.0] * 6, [0, 2]),
        ("max", 1, [0.0] * 6, [0, 1]),
        ("max", 2, [0.0] * 6, [0, 4]),
        ("top2", 3, [0.0] * 6, [0, 4]),
        # 0.3 for expert 5 lifts its group to 1.2, the best; the weights below stay those of the scores alone.
        ("top2", 1, [0.0, 0.0, 0.0, 0.0, 0.0, 0.3], [4, 5]),
        # All below zero: an expert of a dropped group must not win for being 0.
        ("top2", 1, [-2.0] * 6, [2, 3]),
    ],
)
def test_a_group_limit_chooses_as_computed_by_hand(
    group_score: Literal["max", "top2"], topk_group: int, bias: list[float], chosen: list[int]
) -> None:
    routing = Routing(
        "by_hand", "sigmoid", 6, 2, False, 2.0, n_group=3, topk_group=topk_group,
        group_score=group_score, bias_name="bias",
    )  # fmt: skip
    weight = torch.tensor([[logit(score)] for score in SCORES])
    topk_weights, topk_ids = route(routing, torch.ones(1, 1), weight, torch.tensor(bias))
    assert sorted(topk_ids[0].tolist()) == chosen
    assert topk_weights[0].tolist() == pytest.approx([2.0 * SCORES[e] for e in topk_ids[0].tolist()], rel=TOLERANCE)


def test_softmax_chooses_as_computed_by_hand() -> None:
    # Logits ln 5, ln 3, ln 1, ln 1: softmax 0.5, 0.3, 0.1, 0.1; of the best two, 5/8 and 3/8.
    weight = torch.tensor([5.0, 3.0, 1.0, 1.0]).log().unsqueeze(1)
    topk_weights, topk_ids = route(Routing("by_hand", "softmax", 4, 2, True), torch.ones(1, 1), weight)
    assert topk_ids.tolist() == [[0, 1]]
    assert topk_weights[0].tolist() == pytest.approx([0.625, 0.375], rel=TOLERANCE)
    topk_weights, _ = route(Routing("by_hand", "softmax", 4, 2, False), torch.ones(1, 1), weight)
    assert topk_weights[0].tolist() == pytest.approx([0.5, 0.3], rel=TOLERANCE)


def test_epsilon_keeps_vanished_scores_finite() -> None:
    # sigmoid(-200) is 0 in float32: the models that add the epsilon give 0, the others 0 / 0.
    weight = torch.full((4, 1), -200.0)
    with_epsilon = Routing("by_hand", "sigmoid", 4, 2, True, epsilon=1e-20)
    assert route(with_epsilon, torch.ones(1, 1), weight)[0].tolist() == [[0.0, 0.0]]
    without = with_epsilon._replace(epsilon=0.0)
    assert route(without, torch.ones(1, 1), weight)[0].isnan().all()


def test_these_families_have_an_epsilon() -> None:
    with_epsilon = {golden_routing(name).model_type for name in CASES if golden_routing(name).epsilon}
    without = {"minimax_m2", "minimax_m3", "llama4"}
    assert with_epsilon == {
        golden_routing(name).model_type for name in CASES
        if golden_routing(name).scoring in ("sigmoid", "sqrtsoftplus") or name in ("deepseek", "bailing_moe")
    } - without  # fmt: skip
    assert golden_routing("lfm2_moe").epsilon == 1e-6
    assert golden_routing("ernie4_5_moe").floor == 1e-12


def test_bf16_inputs_are_computed_in_float32() -> None:
    name = "deepseek_v3"
    states, weight, bias = (TENSORS[f"{name}.{part}"].bfloat16() for part in ("hidden_states", "weight", "bias"))
    from_bf16 = route(golden_routing(name), states, weight, bias)
    from_f32 = route(golden_routing(name), states.float(), weight.float(), bias.float())
    assert all(torch.equal(left, right) for left, right in zip(from_bf16, from_f32, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_no_tokens_are_routed_to_nothing(name: str) -> None:
    routing = golden_routing(name)
    bias = TENSORS.get(f"{name}.bias")
    topk_weights, topk_ids = route(routing, torch.empty(0, 16), TENSORS[f"{name}.weight"], bias, extras(name))
    assert topk_weights.shape == topk_ids.shape == (0, routing.top_k)


# "meta" refuses to meet a tensor of another device, so without a GPU it still finds one that route() misplaces.
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_stays_on_the_device(name: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    routing = golden_routing(name)
    bias = TENSORS.get(f"{name}.bias")
    topk_weights, topk_ids = route(
        routing,
        TENSORS[f"{name}.hidden_states"].to(device),
        TENSORS[f"{name}.weight"].to(device),
        None if bias is None else bias.to(device),
        RouterExtras(*(None if tensor is None else tensor.to(device) for tensor in extras(name))),
    )
    assert topk_weights.device.type == topk_ids.device.type == device
    if device == "cuda":
        expected_ids = without_zero_experts(TENSORS[f"{name}.topk_ids"], routing)
        assert torch.equal(topk_ids.cpu().sort(-1).values, expected_ids.sort(-1).values)


def test_refuses_tensors_that_do_not_fit() -> None:
    plain = Routing("mixtral", "softmax", 4, 2, True)
    biased = plain._replace(bias_name="gate.bias")
    hidden_states, weight, bias = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="does not fit 4 experts"):
        route(plain, hidden_states, torch.zeros(5, 8))
    with pytest.raises(ValueError, match="does not fit 4 experts"):
        route(plain, hidden_states, torch.zeros(4, 7))
    with pytest.raises(ValueError, match="does not fit 4 experts"):
        route(plain, torch.zeros(8), weight)
    with pytest.raises(ValueError, match="with a correction bias"):
        route(biased, hidden_states, weight)
    with pytest.raises(ValueError, match="without a correction bias"):
        route(plain, hidden_states, weight, bias)
    with pytest.raises(ValueError, match="correction bias"):
        route(biased, hidden_states, weight, torch.zeros(1))


@pytest.mark.parametrize(
    ("name", "moe_module", "expected"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe", ("gate.weight", None)),
        ("qwen3_5_moe", "model.language_model.layers.3.mlp", ("gate.weight", None)),
        ("deepseek_v2-greedy", "model.layers.1.mlp", ("gate.weight", None)),
        ("deepseek_v3", "model.layers.1.mlp", ("gate.weight", "gate.e_score_correction_bias")),
        ("kimi_k2", "model.layers.1.mlp", ("gate.weight", "gate.e_score_correction_bias")),
        ("glm4_moe", "model.layers.1.mlp", ("gate.weight", "gate.e_score_correction_bias")),
        ("minimax_m2", "model.layers.0.block_sparse_moe", ("gate.weight", "e_score_correction_bias")),
        ("step3p5", "model.layers.1.moe", ("gate.weight", "router_bias")),
    ],
)
def test_a_router_is_found_under_the_names_of_its_family(
    name: str, moe_module: str, expected: tuple[str, str | None]
) -> None:
    weight, bias = (part and f"{moe_module}.{part}" for part in expected)
    assert router_tensor_names(golden_routing(name), moe_module)[:2] == (weight, bias)


def test_uniform_routing_chooses_every_pair_alike() -> None:
    topk_weights, topk_ids = uniform_routing(4000, 6, 2, torch.Generator().manual_seed(3))
    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype == torch.int64
    assert topk_weights.shape == topk_ids.shape == (4000, 2)
    assert (topk_weights > 0).all()
    torch.testing.assert_close(topk_weights.sum(-1), torch.ones(4000))
    pairs = Counter(tuple(sorted(row)) for row in topk_ids.tolist())
    assert all(first != second for first, second in pairs)
    # 15 pairs, 267 of each expected with a standard deviation of 16; five of those either way.
    assert len(pairs) == 15
    assert all(187 < count < 347 for count in pairs.values())


def test_uniform_routing_repeats_and_has_limits() -> None:
    first, again = (uniform_routing(5, 4, 4, torch.Generator().manual_seed(9)) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    assert first[1].sort(-1).values.tolist() == [[0, 1, 2, 3]] * 5
    for top_k in (0, 5):
        with pytest.raises(ValueError, match="distinct experts"):
            uniform_routing(5, 4, top_k, torch.Generator())
