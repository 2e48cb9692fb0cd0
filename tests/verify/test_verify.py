"""verify on what is right: every stage passes, and says what it did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import Tensors
from support.exports import Checkpoints, Converted
from support.program import PROCESS_TIMEOUT, run_cli

import quarkconv
from quarkconv.cli.main import main
from quarkconv.description.description import describe
from quarkconv.experts.function import ExpertActivation
from quarkconv.verify.reference import reference_forwards
from quarkconv.verify.routing import uniform_routing

pytestmark = pytest.mark.long(20)

CONVERTIBLE = [
    "qwen3_moe-quark0.13-f2f",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "mixtral-quark0.11-eager",
    "step3p5-like-3key_fused",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "qwen3_moe-quark0.11-eager-int8_static",
    "deepseek_v3-0.13-f2f-mtp",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen2_moe-0.11-eager-shared_expert",
    "qwen3_5_moe-0.13-f2f-language_model",
    "qwen3_moe-0.13-f2f-wrapped",
    "qwen3_moe-0.13-f2f-attention_per_tensor",
    "qwen3_moe-0.13-f2f-experts_per_projection",
]


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("with_source", [True, False])
def test_conversion_is_verified(name: str, with_source: bool, checkpoints: Checkpoints, converted: Converted) -> None:
    source = checkpoints(name) if with_source else None
    result = quarkconv.verify_checkpoint(converted(name), source, device="cpu")
    assert result.problems == ()
    assert result.ok
    assert result.bytes.skipped is None
    assert result.bytes.against_source is with_source
    assert result.numbers.layers
    for layer in result.numbers.layers:
        assert layer.reached == layer.experts
        assert layer.exact.relative_error <= layer.exact.bound
        assert 0 < layer.dequantized.relative_error <= layer.dequantized.bound
        assert layer.dequantized.cosine > 0.99


@pytest.mark.parametrize("name", [name for name in CONVERTIBLE if "language_model" not in name])
def test_export_as_it_came_is_verified_but_for_its_bytes(name: str, checkpoints: Checkpoints) -> None:
    result = quarkconv.verify_checkpoint(checkpoints(name), device="cpu")
    assert result.ok
    assert result.bytes.pieces == 0
    assert result.bytes.skipped is not None
    assert "no quarkconv.json" in result.bytes.skipped
    assert result.numbers.layers


def test_config_that_lies_is_a_problem_and_numbers_are_checked_all_the_same(checkpoints: Checkpoints) -> None:
    result = quarkconv.verify_checkpoint(checkpoints("qwen3_5_moe-0.13-f2f-language_model"), device="cpu")
    (problem,) = result.problems
    assert (problem.stage, problem.tensor) == ("structure", "mtp.layers.0.mlp.experts")
    assert "experts-not-quantized" in problem.message
    assert [layer.ok for layer in result.numbers.layers] == [True, True]


def test_export_and_conversion_give_the_same_numbers(checkpoints: Checkpoints, converted: Converted) -> None:
    name = "mixtral-quark0.11-eager"
    one = quarkconv.verify_checkpoint(checkpoints(name), device="cpu").numbers.layers
    other = quarkconv.verify_checkpoint(converted(name), device="cpu").numbers.layers
    assert [layer.dequantized for layer in one] == [layer.dequantized for layer in other]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("mixtral-quark0.11-eager", "softmax, top 2 of 6, renormalised"),
        ("deepseek_v3-quark0.13-f2f", "sigmoid + correction bias, top 4 of 8 in 2 of 4 groups, renormalised, x2.5"),
        ("step3p5-like-3key_fused", "sigmoid + correction bias, top 2 of 6, renormalised, x3"),
    ],
)
def test_routing_is_the_models_own(name: str, family: str, checkpoints: Checkpoints) -> None:
    layers = quarkconv.verify_checkpoint(checkpoints(name), device="cpu").numbers.layers
    assert {layer.routing for layer in layers} == {f"the model's own: {family}"}


def with_config(checkpoints: Checkpoints, folder: Path, **changes: object) -> Path:
    model = checkpoints.copy("qwen3_moe-quark0.13-f2f", folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    return model


def test_a_model_that_is_not_known_has_no_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = with_config(checkpoints, tmp_path / "model", model_type="something_new")
    numbers = quarkconv.verify_checkpoint(model, device="cpu").numbers
    assert numbers.layers == ()
    assert numbers.skipped == "the function of the experts is unknown: the model type something_new is not known"


def test_a_setting_that_is_not_known_stops_the_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = with_config(checkpoints, tmp_path / "model", swiglu_limit=7.0)
    numbers = quarkconv.verify_checkpoint(model, device="cpu").numbers
    assert numbers.layers == ()
    assert numbers.skipped is not None
    assert "swiglu_limit = 7.0" in numbers.skipped


def test_an_unknown_routing_is_uniform_and_named_so(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = with_config(checkpoints, tmp_path / "model", norm_topk_prob=None)
    layers = quarkconv.verify_checkpoint(model, device="cpu", layers={0}).numbers.layers
    reason = "config.json has no norm_topk_prob"
    assert layers[0].routing == f"uniform random top 3 of 8 (the model's own routing is unknown: {reason})"


def test_layers_tokens_and_seed_are_chosen(checkpoints: Checkpoints) -> None:
    model = checkpoints("qwen3_moe-quark0.13-f2f")
    one = quarkconv.verify_checkpoint(model, device="cpu", layers={0, 2}, tokens=1, seed=3).numbers
    assert [layer.layer for layer in one.layers] == [0, 2]
    assert (one.tokens, one.seed) == ((1,), 3)
    again = quarkconv.verify_checkpoint(model, device="cpu", layers={2}, tokens=1, seed=3).numbers
    other = quarkconv.verify_checkpoint(model, device="cpu", layers={2}, tokens=1, seed=4).numbers
    assert again.layers[0].dequantized == one.layers[1].dequantized != other.layers[0].dequantized


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"layers": {7}}, 2),
        ({"device": "tpu"}, 2),
        ({"tokens": 0}, 2),
    ],
)
def test_wrong_usage_is_refused(arguments: dict[str, Any], code: int, checkpoints: Checkpoints) -> None:
    with pytest.raises(quarkconv.QuarkconvError) as caught:
        quarkconv.verify_checkpoint(checkpoints("qwen3_moe-quark0.13-f2f"), **{"device": "cpu", **arguments})
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    "name", ["qwen3_moe-bf16", "mixtral-quark0.13-eager-experts_left_bf16", "qwen3-0.13-f2f-dense"]
)
def test_nothing_to_verify_is_unsupported(name: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(quarkconv.UnsupportedError):
        quarkconv.verify_checkpoint(checkpoints(name), device="cpu")


def test_wrong_source_is_refused(checkpoints: Checkpoints, converted: Converted) -> None:
    with pytest.raises(quarkconv.SourceError):
        quarkconv.verify_checkpoint(
            converted("qwen3_moe-quark0.13-f2f"), checkpoints("minimax_m2-quark0.13-f2f"), device="cpu"
        )


Original = list[list[torch.Tensor]]
"""Expert -> gate, up, down in float64."""


@pytest.fixture(scope="module")
def original_experts(checkpoints: Checkpoints) -> Original:
    """Layer 0 of the BF16 model that qwen3_moe-quark0.13-f2f was quantized from: (gate, up, down) of each expert."""
    weights: Tensors = {}
    for path in sorted(checkpoints("qwen3_moe-bf16").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if ".layers.0." in name}  # noqa: SIM118
    names = ("gate_proj", "up_proj", "down_proj")
    return [
        [weights[f"model.layers.0.mlp.experts.{expert}.{name}.weight"].double() for name in names]
        for expert in range(8)
    ]


def test_quantized_weights_stay_close_to_the_original(checkpoints: Checkpoints, original_experts: Original) -> None:
    experts = quarkconv.load_fused_experts(checkpoints("qwen3_moe-quark0.13-f2f"), 0)
    noise = signal = 0.0
    for expert, (gate, up, down) in enumerate(original_experts):
        w13 = experts.w13[expert].double() * experts.w13_scale[expert].double()
        w2 = experts.w2[expert].double() * experts.w2_scale[expert].double()
        for expected, found in ((torch.cat([gate, up]), w13), (down, w2)):
            noise += (found - expected).pow(2).sum().item()
            signal += expected.pow(2).sum().item()
            # A code is at most half a step away from the value it stands for.
            step = expected.abs().amax(1, keepdim=True) / 127
            assert ((found - expected).abs() <= 0.51 * step).all()
    relative = (noise / signal) ** 0.5
    print(f"relative error of the weights: {relative:.4f}")
    assert 1e-3 < relative < 1e-2


def test_dequantized_reference_stays_close_to_the_original(
    checkpoints: Checkpoints, original_experts: Original
) -> None:
    description = describe(checkpoints("qwen3_moe-quark0.13-f2f"))
    layer = description.moe_layers[0]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(256, layer.hidden, generator=generator).bfloat16()
    weights, ids = uniform_routing(256, layer.experts, 3, generator)
    experts = quarkconv.load_fused_experts(checkpoints("qwen3_moe-quark0.13-f2f"), 0)
    references = reference_forwards(states, weights, ids, experts.projection, ExpertActivation("silu"))
    found = references.dequantized
    expected = torch.zeros_like(found)
    for token, x in enumerate(states.double()):
        for slot in range(3):
            gate, up, down = original_experts[ids[token, slot]]
            output = down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
            expected[token] += weights[token, slot].double() * output
    relative = ((found - expected).norm() / expected.norm()).item()
    print(f"relative error of the layer's output: {relative:.4f}")
    # The weights are off by 0.6 %, independently in the three projections.
    assert 1e-3 < relative < 2e-2


def test_the_command_has_json_and_exit_codes(
    converted: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "quarkconv", "verify", str(converted("qwen3_moe-quark0.13-f2f"))]
    done = subprocess.run(
        [*command, "--json", "--device", "cpu", "--layers", "0-1", "--report", str(report)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["schema"] == "quarkconv.verify/1"
    assert value["ok"] is True
    assert [layer["layer"] for layer in value["numbers"]["layers"]] == [0, 1]
    html = report.read_text("utf-8")
    assert "Verified" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    code, out, _ = run_cli(capsys, *command[3:], "--layers", "5-2")
    assert (code, out) == (2, "")


def test_numbers_that_are_not_finite_are_null_in_json(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.copy("qwen3_moe-quark0.13-f2f", tmp_path / "model")
    for path in model.glob("*.safetensors"):  # every tensor zero: outputs are zero, and relative errors undefined
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(SystemExit) as exited:
        main(["verify", str(model), "--json", "--device", "cpu", "--layers", "0"])
    assert exited.value.code == 1

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    value = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert value["numbers"]["layers"][0]["dequantized"]["cosine"] is None


def test_a_report_that_cannot_be_written_leaves_one_object_on_stdout(
    converted: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["verify", str(converted("qwen3_moe-quark0.13-f2f")), "--json", "--device", "cpu", "--layers", "0",
              "--report", str(tmp_path / "no" / "report.html")])  # fmt: skip
    assert exited.value.code == 5
    assert json.loads(capsys.readouterr().out)["exit_code"] == 5


def test_a_weight_file_that_the_manifest_does_not_know_is_a_problem(converted: Converted, tmp_path: Path) -> None:
    model = Path(shutil.copytree(converted("qwen3_moe-quark0.13-f2f"), tmp_path / "model"))
    (model / "modeling_x.py").write_text("raise SystemExit")
    (model / "notes.txt").write_text("mine")
    (problem,) = quarkconv.verify_checkpoint(model, device="cpu", layers={0}).problems
    assert problem.tensor == "modeling_x.py"


@pytest.mark.parametrize("device", ["nope", "cuda:99", "mps"])
def test_devices_that_are_not_there(device: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(quarkconv.UsageError):
        quarkconv.load_fused_experts(checkpoints("qwen3_moe-quark0.13-f2f"), 0, device)


def test_without_numpy_there_is_no_warning_of_torch(converted: Converted) -> None:
    program = "import sys; sys.modules['numpy'] = None; from quarkconv.cli.main import run; run()"
    command = [sys.executable, "-c", program, "verify", str(converted(CONVERTIBLE[0]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
