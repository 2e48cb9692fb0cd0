"""Which stages run, over how many tokens, with which inputs; and layers read while others are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import Tensors, make_checkpoint
from support.exports import Checkpoints, Converted
from support.program import run_cli
from support.progress import Recorder
from torch import Tensor

import quarkconv
from quarkconv.description.description import describe
from quarkconv.load.arenas import ArenaPool
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify import streaming
from quarkconv.verify.inputs import RecordedInputs, random_inputs

pytestmark = pytest.mark.long(10)

NAME = "qwen3_moe-quark0.13-f2f"


def test_no_more_than_two_layers_are_in_memory(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def pool(count: int, nbytes: int) -> ArenaPool:
        taken.append(count)
        return ArenaPool(count, nbytes)

    monkeypatch.setattr(streaming, "ArenaPool", pool)
    result = quarkconv.verify_checkpoint(converted(NAME), device="cpu")
    assert result.ok
    assert len(result.numbers.layers) == 3
    assert taken == [2]


def test_every_byte_is_compared_once(converted: Converted) -> None:
    progress = Recorder()
    assert quarkconv.verify_checkpoint(converted(NAME), device="cpu", progress=progress).ok
    (step,) = progress.named("Checking")
    assert step.unit == "byte"
    assert sum(step.advances) == step.total


def test_layers_are_counted_where_no_bytes_are(checkpoints: Checkpoints) -> None:
    progress = Recorder()
    assert quarkconv.verify_checkpoint(checkpoints(NAME), device="cpu", tokens=[4, 9], progress=progress).ok
    (step,) = progress.named("Checking")
    assert (step.unit, step.total, step.advances) == ("layer", 6, [1] * 6)


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_a_changed_code_is_found_while_its_layer_is_read(
    projection: str, position: str, converted: Converted, tmp_path: Path, copy_tree: Callable[[Path, Path], Path]
) -> None:
    folder = copy_tree(converted(NAME), tmp_path / "copy")
    refs = describe(folder).checkpoint.refs()
    ref = refs[f"model.layers.1.mlp.experts.{projection}"]
    with open(folder / ref.file, "r+b") as file:
        at = ref.start if position == "first" else ref.end - 1
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    problems = quarkconv.verify_checkpoint(folder, device="cpu").problems
    assert [(item.stage, item.layer) for item in problems] == [("bytes", 1)]
    assert projection in problems[0].tensor
    fast = quarkconv.verify_checkpoint(folder, device="cpu", fail_fast=True)
    assert not fast.ok
    assert len(fast.numbers.layers) < 3


@pytest.fixture
def copy_tree() -> Callable[[Path, Path], Path]:
    import shutil

    return lambda one, other: shutil.copytree(one, other)


def test_each_stage_runs_alone(converted: Converted) -> None:
    model = converted(NAME)
    alone = quarkconv.verify_checkpoint(model, device="cpu", stages=["bytes"])
    assert alone.ok
    assert alone.bytes.pieces
    assert (alone.numbers.layers, alone.numbers.skipped) == ((), "not requested")
    alone = quarkconv.verify_checkpoint(model, device="cpu", stages=["numbers"])
    assert alone.ok
    assert alone.bytes.skipped == "not requested"
    assert alone.numbers.layers


def test_several_numbers_of_tokens_are_checked(converted: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(
        capsys, "verify", converted(NAME), "--device", "cpu", "--tokens", "4,300", "--layers", "1", "--json"
    )
    assert code == 0
    numbers = json.loads(out)["numbers"]
    assert numbers["tokens"] == [4, 300]
    assert [layer["tokens"] for layer in numbers["layers"]] == [4, 300]
    assert sum(numbers["experts"][0]["load"]) == 300 * 3


@pytest.mark.parametrize("words", [["--tokens", "0"], ["--tokens", "1,x"], ["--bytes-only", "--numbers-only"]])
def test_wrong_usage_exits_2(words: list[str], converted: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(capsys, "verify", converted(NAME), "--device", "cpu", *words)[0] == 2


def rounding_noise(states: Tensor) -> float:
    """Relative noise of hidden states [M, H] in 8 bits with a scale per token: step / sqrt(12) / root mean square."""
    wide = states.double()
    step = wide.abs().amax(dim=1) / 127
    return ((step / wide.square().mean(dim=1).sqrt()).square().mean() / 12).sqrt().item()


def test_inputs_with_outliers_have_the_documented_distribution(converted: Converted) -> None:
    experts = quarkconv.load_fused_experts(converted(NAME), 0)
    inputs = random_inputs(experts, 200, 0)
    assert inputs.plain == 100
    crest = inputs.states.float().abs().amax(dim=1) / inputs.states.float().square().mean(dim=1).sqrt()
    assert crest[:100].max() < 6
    assert crest[100:].median() > 6
    assert rounding_noise(inputs.states[:100]) < 0.02 < rounding_noise(inputs.states[100:])


def test_rounding_noise_is_that_of_quantizing() -> None:
    states = torch.randn(50, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = states.double().abs().amax(dim=1, keepdim=True) / 127
    rounded = (states.double() / scale).round() * scale
    measured = ((rounded - states.double()).norm() / states.double().norm()).item()
    assert rounding_noise(states) == pytest.approx(measured, rel=0.02)


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    def write(**tensors: torch.Tensor) -> Path:
        save_file(tensors, tmp_path / "states.safetensors")
        return tmp_path / "states.safetensors"

    return write


def test_recorded_hidden_states_are_used(converted: Converted, recorded: Callable[..., Path]) -> None:
    states = torch.randn(3, 10, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    file = recorded(**{"model.layers.1.mlp": states, "2": states.float()})
    result = quarkconv.verify_checkpoint(converted(NAME), device="cpu", activations=file, layers={1, 2}, tokens=25)
    assert result.ok
    assert [layer.inputs for layer in result.numbers.layers] == [
        "recorded: states.safetensors, model.layers.1.mlp", "recorded: states.safetensors, 2",
    ]  # fmt: skip
    assert [layer.outliers for layer in result.numbers.layers] == [None, None]
    assert sum(result.numbers.experts[0].load) == 25 * 3
    layer = describe(converted(NAME)).int8_layers[1]
    recorded_states = RecordedInputs(file).inputs(layer, 25, torch.device("cpu")).states
    assert torch.equal(recorded_states, states.reshape(-1, 128)[:25])


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"3": torch.zeros(2, 128)}, "of a layer are missing"),
        ({"hidden_states": torch.zeros(2, 64)}, "wrong shape or dtype"),
        ({"hidden_states": torch.zeros(2, 128, dtype=torch.int32)}, "wrong shape or dtype"),
    ],
)
def test_recorded_states_that_do_not_fit(
    tensors: Tensors, reason: str, converted: Converted, recorded: Callable[..., Path]
) -> None:
    with pytest.raises(quarkconv.UsageError, match=reason):
        quarkconv.verify_checkpoint(converted(NAME), device="cpu", activations=recorded(**tensors))


def test_recorded_states_that_cannot_be_read(converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(quarkconv.SourceError, match="recorded activations"):
        quarkconv.verify_checkpoint(converted(NAME), device="cpu", activations=tmp_path / "x")


def test_layers_are_dealt_out_over_devices(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarkconv.verify.verify.pick_devices", lambda _: (torch.device("cpu"),) * 3)
    result = quarkconv.verify_checkpoint(converted(NAME), device="cpu")
    assert result.ok
    assert [layer.layer for layer in result.numbers.layers] == [0, 1, 2]
    assert result.numbers.device == "3 x cpu"


def test_an_error_in_a_thread_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "m", layers=3)

    def fail(*_: object, **__: object) -> None:
        raise quarkconv.SourceError("broken while it was read", code="shard-truncated")

    monkeypatch.setattr(LayerReader, "read", fail)
    with pytest.raises(quarkconv.SourceError, match="broken while"):
        quarkconv.verify_checkpoint(folder, device="cpu")


def test_a_router_that_is_not_finite_is_named_and_experts_are_checked(tmp_path: Path, checkpoints: Checkpoints) -> None:
    model = checkpoints.copy(NAME, tmp_path / "model")
    ref = describe(model).checkpoint.refs()["model.layers.1.mlp.gate.weight"]
    with open(model / ref.file, "r+b") as file:
        file.seek(ref.start)
        file.write(b"\xff" * 2)
    result = quarkconv.verify_checkpoint(model, device="cpu")
    (problem,) = result.problems
    assert (problem.layer, problem.tensor) == (1, "model.layers.1.mlp")
    assert "not finite" in problem.message
    assert all(layer.ok for layer in result.numbers.layers)
    assert "uniform random" in result.numbers.layers[1].routing


@pytest.mark.parametrize("stages", [["byte"], ["bytes", "number"], "bytes", "numbers"])
def test_an_unknown_stage_is_refused(stages: Any, converted: Converted) -> None:
    """It was left out silently, and the checkpoint counted as verified."""
    with pytest.raises(quarkconv.UsageError, match="Invalid `stages`"):
        quarkconv.verify_checkpoint(converted(NAME), device="cpu", stages=stages)


def test_an_empty_list_of_layers_is_refused(converted: Converted) -> None:
    with pytest.raises(quarkconv.UsageError, match="`layers` is empty"):
        quarkconv.verify_checkpoint(converted(NAME), device="cpu", layers=[])
