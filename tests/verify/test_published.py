"""``--unquantized`` against models as they are published: SmoothQuant's factors, transposed and interleaved layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.quark_config import quark_config
from torch import Tensor

import quarkconv
from quarkconv.verify.results import Verification

E, H, I = 4, 64, 32  # noqa: E741
Tensors = dict[str, Tensor]
Experts = list[dict[str, Tensor]]
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I, "num_hidden_layers": 1, "num_experts": E,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "hidden_act": "silu",
}  # fmt: skip
MOE = "model.layers.0.mlp"


def random_experts(seed: int = 0) -> tuple[Experts, Tensor]:
    """Float weights of every expert in bfloat16, and the router's weight."""
    random = torch.Generator().manual_seed(seed)

    def weight(out: int, columns: int) -> Tensor:
        return (torch.randn(out, columns, generator=random) * 0.05).bfloat16()

    experts = [{"gate": weight(I, H), "up": weight(I, H), "down": weight(H, I)} for _ in range(E)]
    return experts, weight(E, H)


def write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_quantized(folder: Path, experts: Experts, router: Tensor, config: dict[str, Any], moe: str = MOE) -> Path:
    """A Quark export: one int8 code and scale per row."""
    tensors = {f"{moe}.gate.weight": router}
    for number, expert in enumerate(experts):
        for role, weight in expert.items():
            scale = weight.float().abs().amax(1) / 127
            name = f"{moe}.experts.{number}.{role}_proj.weight"
            tensors[name] = torch.round(weight.float() / scale[:, None]).to(torch.int8)
            tensors[f"{name}_scale"] = scale
    return write(folder, tensors, {**config, "quantization_config": quark_config(exclude=[f"{moe}.gate"])})


def one_by_one(experts: Experts, router: Tensor) -> Tensors:
    named = {f"{MOE}.experts.{n}.{role}_proj.weight": w for n, item in enumerate(experts) for role, w in item.items()}
    return {f"{MOE}.gate.weight": router, **named}


def smoothed(experts: Experts, router: Tensor, seed: int = 1) -> tuple[Experts, Tensor]:
    """The same function after SmoothQuant, for hidden states that are divided by s."""
    random = torch.Generator().manual_seed(seed)
    s = torch.exp(torch.randn(H, generator=random) * 0.7)
    result = []
    for expert in experts:
        r = torch.exp(torch.randn(I, generator=random) * 0.5)
        result.append({"gate": expert["gate"] * s, "up": expert["up"] * s / r[:, None], "down": expert["down"] * r})
    return result, (router * s).bfloat16()


def verified(model: Path, unquantized: Path) -> Verification:
    return quarkconv.verify_checkpoint(model, device="cpu", unquantized=unquantized)


def test_factors_of_smoothquant_are_named_and_outputs_compared_without_them(tmp_path: Path) -> None:
    experts, router = random_experts()
    original = write(tmp_path / "original", one_by_one(experts, router), CONFIG)
    model = write_quantized(tmp_path / "model", *smoothed(experts, router), CONFIG)
    result = verified(model, original)
    assert result.problems == ()
    (layer,) = result.numbers.experts
    assert layer.rescaled
    assert max(error.relative_error for role in layer.weights.values() for error in role) < 0.02
    (numbers,) = result.numbers.layers
    assert numbers.unquantized is not None
    assert numbers.unquantized.relative_error < 0.1
    assert result.to_json()["numbers"]["experts"][0]["rescaled"] is True


def test_a_model_without_factors_is_not_called_rescaled(tmp_path: Path) -> None:
    experts, router = random_experts()
    original = write(tmp_path / "original", one_by_one(experts, router), CONFIG)
    result = verified(write_quantized(tmp_path / "model", experts, router, CONFIG), original)
    assert result.ok
    assert not result.numbers.experts[0].rescaled


def exchange_experts(experts: Experts, router: Tensor) -> tuple[Experts, Tensor]:
    return [experts[1], experts[0], *experts[2:]], router


def scale_rows_of_up(experts: Experts, router: Tensor) -> tuple[Experts, Tensor]:
    return [{**expert, "up": expert["up"] * torch.linspace(0.3, 3, I)[:, None]} for expert in experts], router


def scale_rows_of_gate(experts: Experts, router: Tensor) -> tuple[Experts, Tensor]:
    return [{**expert, "gate": expert["gate"] * torch.linspace(0.3, 3, I)[:, None]} for expert in experts], router


def leave_the_router_without_factors(experts: Experts, router: Tensor) -> tuple[Experts, Tensor]:
    return smoothed(experts, router)[0], router


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange_experts, "not the unquantized model's"),
        (scale_rows_of_up, "do not cancel"),
        (scale_rows_of_gate, "not the unquantized model's"),
        (leave_the_router_without_factors, "the router does not"),
    ],
)
def test_other_differences_are_problems(
    change: Callable[[Experts, Tensor], tuple[Experts, Tensor]], message: str, tmp_path: Path
) -> None:
    experts, router = random_experts()
    original = write(tmp_path / "original", one_by_one(experts, router), CONFIG)
    problems = verified(write_quantized(tmp_path / "model", *change(experts, router), CONFIG), original).problems
    assert problems
    assert message in problems[0].message


def transposed(experts: Experts) -> Tensors:
    gate_up = torch.stack([torch.cat([item["gate"], item["up"]]).T for item in experts])
    down = torch.stack([item["down"].T for item in experts])
    return {f"{MOE}.experts.gate_up_proj": gate_up, f"{MOE}.experts.down_proj": down}


def linear(experts: Experts) -> Tensors:
    gate_up = torch.stack([torch.cat([item["gate"], item["up"]]) for item in experts])
    down = torch.stack([item["down"] for item in experts])
    return {f"{MOE}.input_linear.weight": gate_up, f"{MOE}.output_linear.weight": down}


def fused(experts: Experts) -> Tensors:
    names = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
    return {f"{MOE}.{names[name.removeprefix(f'{MOE}.')]}": tensor for name, tensor in linear(experts).items()}


@pytest.mark.parametrize("layout", [transposed, linear, fused])
@pytest.mark.parametrize("wrapper", ["", "language_model."])
def test_published_layouts_are_read_as_experts_one_by_one(
    layout: Callable[[Experts], Tensors], wrapper: str, tmp_path: Path
) -> None:
    experts, router = random_experts()
    model = write_quantized(tmp_path / "model", experts, router, CONFIG)
    expected = verified(model, write(tmp_path / "one", one_by_one(experts, router), CONFIG))
    tensors = {f"{wrapper}{name}": tensor for name, tensor in layout(experts).items()}
    found = verified(model, write(tmp_path / "published", tensors, CONFIG))
    assert found.ok
    assert found.numbers.experts == expected.numbers.experts
    first, second = (asdict(layer) for layer in (found.numbers.layers[0], expected.numbers.layers[0]))
    assert first["unquantized"] == pytest.approx(second["unquantized"], rel=1e-12)  # sums in another order: float64


def test_a_layout_that_is_not_read_is_named(tmp_path: Path) -> None:
    experts, router = random_experts()
    model = write_quantized(tmp_path / "model", experts, router, CONFIG)
    blocks = {f"{MOE}.experts.blocks": torch.stack([item["gate"] for item in experts])}
    with pytest.raises(quarkconv.UnsupportedError, match="does not read the layout") as caught:
        verified(model, write(tmp_path / "published", blocks, CONFIG))
    assert caught.value.exit_code == 4
    assert caught.value.found == f"{MOE}.experts.blocks BF16 [4, 32, 64]"


def test_rows_of_zeros_may_have_a_scale_of_zero(tmp_path: Path) -> None:
    experts, router = random_experts()
    experts[1]["up"][5] = 0
    model = write_quantized(tmp_path / "model", experts, router, CONFIG)
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    name = f"{MOE}.experts.1.up_proj.weight"
    assert tensors[f"{name}_scale"][5] == 0
    tensors[name][5] = 0
    save_file(tensors, model / "model.safetensors")
    assert quarkconv.verify_checkpoint(model, device="cpu").ok
    tensors[name][5, 3] = 1
    save_file(tensors, model / "model.safetensors")
    (problem,) = quarkconv.verify_checkpoint(model, device="cpu").problems
    assert "expert 1 has values that are zero or not finite" in problem.message
