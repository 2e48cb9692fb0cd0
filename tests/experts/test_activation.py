"""What experts compute, against the models' own classes (tests/data/routing/make_goldens.py), in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quarkconv.experts.function import ExpertActivation, Unknown
from quarkconv.experts.knowledge import knowledge
from quarkconv.experts.known import Known
from quarkconv.experts.naming import Role
from quarkconv.load.experts import Projection
from quarkconv.verify.activation import activate
from quarkconv.verify.reference import float_forward, reference_forwards

DATA = Path(__file__).parents[1] / "data" / "routing"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "experts.json").read_text())["cases"]
TENSORS = load_file(DATA / "experts.safetensors")
LAYER = 1

# Both sides compute in float64; dot products of 16 terms in another order differ by a few 1e-16 of the largest term.
TOLERANCE = 1e-12


def experts_of(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in TENSORS.items() if key.startswith(f"{name}.")}


def projections(name: str) -> tuple[dict[Role, Tensor], dict[Role, Tensor]]:
    """The weights [E, out, in] and biases [E, out] of a case, out of the layout of its class."""
    tensors = experts_of(name)
    if name == "dbrx":
        shape = (CASES[name]["experts"], -1, tensors["mlp.w1"].shape[1])
        gate, up, down = (tensors[f"mlp.{leaf}"].reshape(shape) for leaf in ("w1", "v1", "w2"))
        return {"gate": gate, "up": up, "down": down.transpose(1, 2)}, {}
    if name == "nemotron_h":
        return {"up": tensors["up_proj"], "down": tensors["down_proj"]}, {}
    both, down = tensors["gate_up_proj"], tensors["down_proj"]
    if name in ("gpt_oss", "llama4", "aria"):
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    known = knowledge(CASES[name]["config"])
    assert isinstance(known, Known)
    if not known.family.interleaved:
        gate, up = both.chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": down}, {}
    biases = tensors["gate_up_proj_bias"]
    return (
        {"gate": both[:, ::2], "up": both[:, 1::2], "down": down},
        {"gate": biases[:, ::2], "up": biases[:, 1::2], "down": tensors["down_proj_bias"]},
    )


def activation_of(config: dict[str, Any], layer: int) -> ExpertActivation | Unknown:
    known = knowledge(config)
    return known if isinstance(known, Unknown) else known.activation(layer)


def known_activation(name: str) -> ExpertActivation:
    activation = activation_of(CASES[name]["config"], LAYER)
    assert isinstance(activation, ExpertActivation)
    return activation


def computed(name: str, activation: ExpertActivation, *, biased: bool = True) -> Tensor:
    tensors, (weights, biases) = experts_of(name), projections(name)
    known = knowledge(CASES[name]["config"])
    assert isinstance(known, Known)
    assert known.family.biased == bool(biases)
    assert known.family.gated == ("gate" in weights)
    return float_forward(
        tensors["hidden_states"], tensors["topk_weights"], tensors["topk_ids"],
        lambda role, expert: weights[role][expert].double(), activation,
        bias=(lambda role, expert: biases[role][expert].double()) if biases and biased else None,
        on_input=known.family.router.on_input,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_models_own_experts(name: str) -> None:
    expected = TENSORS[f"{name}.output"]
    torch.testing.assert_close(computed(name, known_activation(name)), expected, rtol=TOLERANCE, atol=TOLERANCE)


# Otherwise a golden that a missing step also satisfies would prove nothing about that step.
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gemma4", ExpertActivation("silu")),
        ("gemma4", ExpertActivation("gelu")),
        ("glm5_next", ExpertActivation("silu")),
        ("glm5_next", ExpertActivation("swiglustep", 0.75)),
        ("deepseek_v4", ExpertActivation("silu", 0.7)),
        ("minimax_m3", ExpertActivation("silu", 0.75)),
        ("minimax_m3", ExpertActivation("swigluoai", 0.75, 1.0)),
        ("gpt_oss", ExpertActivation("swigluoai", 7.0, 1.702)),
        ("step3p5", ExpertActivation("silu")),
        ("step3p5", ExpertActivation("silu", 0.5)),
    ],
)
def test_goldens_depend_on_the_activation(name: str, wrong: ExpertActivation) -> None:
    assert (computed(name, wrong) - TENSORS[f"{name}.output"]).abs().max() > 1e-4


def test_goldens_depend_on_the_biases() -> None:
    wrong = computed("gpt_oss", known_activation("gpt_oss"), biased=False)
    assert (wrong - TENSORS["gpt_oss.output"]).abs().max() > 1e-2


@pytest.mark.parametrize(("key", "linear"), [("plain", None), ("clipped", 0.75)])
def test_situ_equals_vllms(key: str, linear: float | None) -> None:
    gate, up = TENSORS["situ.gate_up"].double().chunk(2, dim=-1)
    result = activate(gate, up, ExpertActivation("situ", beta=1.5, linear_beta=linear))
    # vLLM's is float32: five operations on numbers of order 10, each rounded to 6e-8 of its value.
    torch.testing.assert_close(result, TENSORS[f"situ.{key}"].double(), rtol=1e-6, atol=1e-6)


ACTIVATIONS = {
    "mixtral": "silu",
    "gemma4": "gelu_tanh",
    "glm5_next": "silu, clamped at 0.75",
    "deepseek_v4": "silu, clamped at 0.75",
    "minimax_m3": "swigluoai, clamped at 0.75, alpha 1.702",
    "gpt_oss": "swigluoai, clamped at 0.75, alpha 1.702",
    "nemotron_h": "relu2",
    "step3p5": "swiglustep, clamped at 0.5",
    "llama4": "silu",
    "aria": "silu",
    "dbrx": "silu",
}


def test_every_activation_describes_itself() -> None:
    assert {name: known_activation(name).describe() for name in CASES} == ACTIVATIONS


KIMI = {"model_type": "kimi_linear", "hidden_act": "situ", "activation_situ_beta": 2.0}


@pytest.mark.parametrize(
    ("config", "layer", "expected"),
    [
        ({"model_type": "qwen3_moe", "hidden_act": "silu"}, 0, ExpertActivation("silu")),
        ({"model_type": "qwen3_moe"}, 0, ExpertActivation("silu")),
        ({"model_type": "step3p5", "swiglu_limits": [0, 7.0, None]}, 0, ExpertActivation("silu")),
        ({"model_type": "step3p5", "swiglu_limits": [0, 7.0, None]}, 1, ExpertActivation("swiglustep", 7.0)),
        ({"model_type": "step3p5", "swiglu_limits": [0, 7.0, None]}, 2, ExpertActivation("silu")),
        ({"model_type": "gpt_oss", "hidden_act": "silu"}, 0, ExpertActivation("swigluoai", 7.0, 1.702)),
        ({"model_type": "gpt_oss", "swiglu_limit": 5, "swiglu_alpha": 1.5}, 0, ExpertActivation("swigluoai", 5.0, 1.5)),
        (KIMI, 0, ExpertActivation("situ", beta=2.0)),
        ({**KIMI, "activation_situ_linear_beta": 3}, 0, ExpertActivation("situ", beta=2.0, linear_beta=3.0)),
        ({"model_type": "kimi_linear", "hidden_act": "silu"}, 0, ExpertActivation("silu")),
        ({"model_type": "grok-1"}, 0, ExpertActivation("gelu")),
    ],
)
def test_a_config_names_the_activation(config: dict[str, Any], layer: int, expected: ExpertActivation) -> None:
    defaults = {"moe_router_activation": "sigmoid", "use_moe_router_bias": True}
    full = {**defaults, **config} if config["model_type"] == "step3p5" else config
    assert activation_of(full, layer) == expected


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "something_new", "hidden_act": "silu"}, None),
        ({"hidden_act": "silu"}, "model_type"),
        ({"model_type": "qwen3_moe", "hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen3_moe", "hidden_act": ["silu"]}, "hidden_act"),
        ({"model_type": "qwen3_moe", "swiglu_limit": 7.0}, "swiglu_limit"),
        ({"model_type": "qwen3_moe", "swiglu_limits": [0, 7.0]}, "swiglu_limits"),
        ({"model_type": "qwen3_moe", "activation_situ_beta": 2.0}, "activation_situ_beta"),
        ({"model_type": "qwen3_moe", "routed_expert_hidden_size": 8}, "routed_expert_hidden_size"),
        ({"model_type": "glm5_next", "swiglu_limit": None}, "swiglu_limit"),
        ({"model_type": "glm5_next", "swiglu_limit": -1}, "swiglu_limit"),
        ({"model_type": "gemma4_text"}, "hidden_activation"),
        ({"model_type": "nemotron_h", "mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"model_type": "minimax_m3", "swiglu_beta": 0.5}, "swiglu_beta"),
        ({"model_type": "kimi_linear", "hidden_act": "situ", "activation_situ_beta": "1"}, "activation_situ_beta"),
    ],
)
def test_what_is_not_known_is_named_and_never_silu(config: dict[str, Any], key: str | None) -> None:
    found = activation_of(config, 0)
    assert isinstance(found, Unknown)
    assert found.key == key
    assert found.reason
    assert key is None or key in found.reason


def test_both_references_add_biases_and_weigh_the_input() -> None:
    # Weights that int8 holds exactly, one expert of 2 x 2, and tokens that are their own codes over 127.
    codes: dict[Role, Tensor] = {
        "gate": torch.tensor([[1, 0], [0, 1]]), "up": torch.tensor([[2, 0], [0, 2]]),
        "down": torch.tensor([[1, 1], [1, -1]]),
    }  # fmt: skip
    biases: dict[Role, list[float]] = {"gate": [0.5, -0.25], "up": [1.0, 0.0], "down": [8.0, -8.0]}

    def read(role: Role, _: int) -> Projection:
        return Projection(codes[role].to(torch.int8), torch.ones(2), None, torch.tensor(biases[role]))

    states, ids = torch.tensor([[127.0, 0.0]], dtype=torch.bfloat16), torch.tensor([[0, -1]])
    weights = torch.tensor([[0.5, 0.25]])
    activation = ExpertActivation("silu")
    for on_input in (False, True):
        references = reference_forwards(states, weights, ids, read, activation, on_input=on_input)
        factor = 0.5 if on_input else 1.0
        gate = torch.tensor([127 * factor + 0.5, -0.25], dtype=torch.float64)
        up = torch.tensor([254 * factor + 1.0, 0.0], dtype=torch.float64)
        hidden = gate * torch.sigmoid(gate) * up
        down = torch.stack([hidden.sum() + 8.0, hidden[0] - hidden[1] - 8.0]) * (1.0 if on_input else 0.5)
        torch.testing.assert_close(references.dequantized[0], down)
        # bfloat16 keeps 8 bits: of the hidden values, the outputs and the sum.
        torch.testing.assert_close(references.exact[0], down, rtol=2**-7, atol=0)
