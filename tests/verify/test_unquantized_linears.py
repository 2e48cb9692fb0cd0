"""``--unquantized``: int8 linears outside of the routed experts are compared with the unquantized model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from support.checkpoints import edit_checkpoint, load
from support.exports import Checkpoints, Converted
from support.program import run_cli

import quarkconv
from quarkconv.verify.results import Verification

NAME: Final = "qwen3_moe-quark0.13-f2f"
Q_PROJ: Final = "model.layers.0.self_attn.q_proj"
V_PROJ: Final = "model.layers.0.self_attn.v_proj"
O_PROJ: Final = "model.layers.0.self_attn.o_proj"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def verified(converted: Converted, checkpoints: Checkpoints, tmp_path: Path) -> Callable[..., Verification]:
    """Gives the verification of an output beside the unquantized model, changed. Of this, layer 0 alone has values."""

    def verify(change: Change = lambda _: None, layers: frozenset[int] | None = frozenset({0})) -> Verification:
        other = checkpoints.copy("qwen3_moe-bf16", tmp_path / f"other {len(list(tmp_path.iterdir()))}")
        edit_checkpoint(other, change)
        return quarkconv.verify_checkpoint(
            converted(NAME),
            device="cpu",
            unquantized=other,
            tokens=4,
            layers=layers,
        )

    return verify


def test_errors_are_those_of_the_definition(
    verified: Callable[..., Verification], converted: Converted, checkpoints: Checkpoints
) -> None:
    linears = verified().numbers.linears
    assert linears is not None
    stored, original = load(converted(NAME)), load(checkpoints("qwen3_moe-bf16"))
    expected = {}
    for name in [
        name
        for name in stored
        if ".layers.0." in name and name.endswith("_proj.weight") and stored[name].dtype == torch.int8
    ]:
        weight = stored[name].double() * stored[f"{name}_scale"].double()
        expected[name.removesuffix(".weight")] = (
            (weight - original[name].double()).norm() / original[name].double().norm()
        ).item()
    assert (linears.compared, linears.rescaled, linears.not_compared) == (len(expected), 0, ())
    assert len(expected) == 4
    worst = sorted(expected.items(), key=lambda item: -item[1])[: len(linears.worst)]
    assert [name for name, _ in worst] == [item.module for item in linears.worst]
    assert [error for _, error in worst] == pytest.approx([item.relative_error for item in linears.worst], rel=1e-9)


def with_weight(module: str, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, Change]:
    """The module, and a change of its weight alone."""
    name = f"{module}.weight"
    return module, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


FAULTS: Final = {
    "rows in another order": with_weight(Q_PROJ, lambda weight: weight.roll(1, 0)),
    "rows of values in another order": with_weight(V_PROJ, lambda weight: weight.roll(1, 0)),
    "another weight": with_weight(O_PROJ, lambda weight: weight.roll(1, 1)),
    "factors of rows that nothing cancels": with_weight(
        Q_PROJ, lambda weight: weight * (1 + torch.arange(len(weight))[:, None] % 5)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_linears_of_another_model_are_a_problem(fault: str, verified: Callable[..., Verification]) -> None:
    module, change = FAULTS[fault]
    (problem,) = verified(change).problems
    assert (problem.stage, problem.tensor) == ("numbers", module)
    assert "not the unquantized model's" in problem.message


def test_factors_of_inputs_are_those_of_smoothquant(verified: Callable[..., Verification]) -> None:
    """Powers of two, so that the codes of the export are also those of the changed model."""

    def smooth(tensors: dict[str, torch.Tensor]) -> None:
        factors = 2.0 ** (torch.arange(tensors[f"{Q_PROJ}.weight"].shape[1]) % 4 - 1)
        tensors[f"{Q_PROJ}.weight"] = (tensors[f"{Q_PROJ}.weight"] / factors).bfloat16()

    result = verified(smooth)
    assert result.ok
    assert result.numbers.linears is not None
    assert result.numbers.linears.rescaled == 1


def test_factors_of_rows_of_values_are_not_compared(verified: Callable[..., Verification]) -> None:
    def rescale(tensors: dict[str, torch.Tensor]) -> None:
        factors = 2.0 ** (torch.arange(len(tensors[f"{V_PROJ}.weight"])) % 4)
        tensors[f"{V_PROJ}.weight"] = (tensors[f"{V_PROJ}.weight"] / factors[:, None]).bfloat16()

    result = verified(rescale)
    assert result.ok
    assert result.numbers.linears is not None
    assert [item.module for item in result.numbers.linears.not_compared] == [V_PROJ]
    assert "not checked: 1 int8 linear, norms" in result.verdict()


NOT_COMPARED: Final[dict[str, tuple[str, Change]]] = {
    "no such linear": ("no linear of this name", lambda t: t.pop(f"{O_PROJ}.weight")),
    "FP8": ("in F8_E4M3", lambda t: t.update({f"{O_PROJ}.weight": t[f"{O_PROJ}.weight"].to(torch.float8_e4m3fn)})),
    "another shape": ("instead of", lambda t: t.update({f"{O_PROJ}.weight": t[f"{O_PROJ}.weight"][:-1].contiguous()})),
}


@pytest.mark.parametrize("case", NOT_COMPARED)
def test_linears_that_cannot_be_compared_are_named(case: str, verified: Callable[..., Verification]) -> None:
    text, change = NOT_COMPARED[case]
    result = verified(change)
    assert result.ok
    assert result.numbers.linears is not None
    (found,) = result.numbers.linears.not_compared
    assert (found.module, text in found.reason) == (O_PROJ, True)
    assert "not checked: 1 int8 linear, norms" in result.verdict()


def test_only_linears_of_the_requested_layers_are_compared(verified: Callable[..., Verification]) -> None:
    every, some = verified(layers=None).numbers.linears, verified().numbers.linears
    assert every is not None
    assert some is not None
    assert 0 < some.compared < every.compared
    assert all(".layers.0." in item.module for item in some.worst)


def test_both_outputs_name_the_worst(
    converted: Converted, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[str | Path] = [
        "verify",
        converted(NAME),
        "--unquantized",
        checkpoints("qwen3_moe-bf16"),
        "--device",
        "cpu",
        "--layers",
        "0",
    ]
    code, out, _ = run_cli(capsys, *arguments, "--tokens", "4", "--json")
    linears = json.loads(out)["numbers"]["linears"]
    assert (code, linears["not_compared"]) == (0, [])
    code, out, _ = run_cli(capsys, *arguments, "--tokens", "4")
    assert f"{linears['compared']} other int8 linears: at most" in out
    assert linears["worst"][0]["module"] in out.replace("\n", "").replace("  ", "")
