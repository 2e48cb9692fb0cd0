"""Float modules quantized while they are converted: against Quark's own export, and against torch."""

from __future__ import annotations

import json
import shutil
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import Tensors, assert_same_tensors, float_experts, load, make_checkpoint
from support.exports import restore
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start

import quarkconv
from quarkconv.errors import InterruptedByUser, UnsupportedError, UsageError
from quarkconv.plan.pieces import Codes, Copy, OutputShard, OutputTensor, RowScales
from quarkconv.write.held_scales import HeldScales
from quarkconv.write.source_files import SourceFiles
from quarkconv.write.transforms import transformed

ROOT = Path(__file__).resolve().parents[2]
QUARK = ROOT / "examples" / "qwen3_moe-quark0.13-f2f"
FAMILIES = ROOT / "tests" / "data" / "families"
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def bf16(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 of the model that Quark quantized to :data:`QUARK` (the repository keeps only its values)."""
    root = tmp_path_factory.mktemp("bf16")
    source = checkpoints("qwen3_moe-bf16")
    save_file(
        {name: tensor for name, tensor in load(source).items() if name.startswith(LAYER)}, root / "model.safetensors"
    )
    shutil.copy(source / "config.json", root)
    return root


def quark_layer() -> Tensors:
    """What Quark 0.13 wrote for the same layer, file to file."""
    return {name: tensor for name, tensor in load(QUARK).items() if name.startswith(LAYER)}


def convert(source: Path, target: str, out: Path, quantize: Any) -> Path:
    return quarkconv.convert_checkpoint(source, target, out, quantize=quantize, jobs=2).output


def test_codes_and_scales_are_those_of_quark_bit_for_bit(tmp_path: Path, bf16: Path) -> None:
    assert_same_tensors(load(convert(bf16, "quark", tmp_path / "out", "all")), quark_layer())


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "ascend"])
def test_every_int8_target_holds_the_same_codes(tmp_path: Path, bf16: Path, target: str) -> None:
    output = convert(bf16, target, tmp_path / "out", "all")
    assert not quarkconv.inspect_checkpoint(output).description.errors()
    again = quarkconv.convert_checkpoint(output, "quark", tmp_path / "quark").output
    assert_same_tensors(load(again), quark_layer())


def test_verify_computes_the_codes_again(tmp_path: Path, bf16: Path) -> None:
    output = convert(bf16, "fused-int8", tmp_path / "out", "all")
    assert quarkconv.verify_checkpoint(output, bf16, "cpu", tokens=2, unquantized=bf16).ok
    tensors = load(output)
    tensors["model.layers.0.mlp.experts.down_proj"][3, 5, 7] ^= 1
    (shard,) = output.glob("*.safetensors")
    data = shard.read_bytes()
    save_file(tensors, shard, metadata={"format": "pt"})
    assert shard.read_bytes() != data
    assert not quarkconv.verify_checkpoint(output, bf16, "cpu", tokens=2).ok


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows, by the formula."""
    scale = (weight.abs().amax(-1) / 127.5).float()
    return (weight.float() * (1 / scale).unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8), scale


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
def test_experts_that_quark_left_in_float_are_quantized(tmp_path: Path, layout: str) -> None:
    root = float_experts(tmp_path / "model", layout)
    finding = next(item for item in quarkconv.inspect_checkpoint(root).findings if item.code == "experts-not-quantized")
    assert "--quantize missing" in finding.hint
    output = convert(root, "fused-int8", tmp_path / "out", "missing")
    assert quarkconv.verify_checkpoint(output, root, "cpu", tokens=2).ok
    experts, source = quarkconv.load_fused_experts(output, 0), load(root)
    for role, leaf in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        for expert in range(experts.experts):
            if layout == "per_expert":
                weight = source[f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"]
            elif layout == "stacked":
                weight = source[f"model.layers.0.moe.{leaf}.weight"][expert]
            elif role == "down":
                weight = source["model.layers.0.mlp.experts.down_proj"][expert]
            else:
                weight = source["model.layers.0.mlp.experts.gate_up_proj"][expert].chunk(2)[role == "up"]
            found = experts.projection(role, expert)  # type: ignore[arg-type]
            codes, scale = quantized(weight)
            assert torch.equal(found.codes, codes)
            assert torch.equal(found.scale, scale)


def test_missing_leaves_excluded_modules_in_float(tmp_path: Path) -> None:
    root = float_experts(tmp_path / "model")
    output = load(convert(root, "quark", tmp_path / "out", "missing"))
    source = load(root)
    for name, tensor in source.items():
        if ".experts." not in name and not name.endswith("_zero_point"):
            assert torch.equal(output[name].reshape(tensor.shape), tensor), name


FIRST_UP = "model.layers.0.mlp.experts.0.up_proj.weight"
BAD_ROWS: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "zeros": (lambda weight: weight[5].zero_(), "row 5"),
    "NaN": (lambda weight: weight[7, 1:2].fill_(float("nan")), "row 7"),
    "infinity": (lambda weight: weight[2, 0:1].fill_(float("-inf")), "row 2"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_quantized_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, row = BAD_ROWS[case]
    root = float_experts(tmp_path / "model", "per_expert", lambda tensors: damage(tensors[FIRST_UP]))
    before = snapshot(tmp_path)
    arguments = ("convert", root, "--to", "quark", "--quantize", "missing", "--out", tmp_path / "out")
    code, _, err = run_cli(capsys, *arguments)
    assert code == 4
    assert FIRST_UP in err
    assert row in err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_row_that_cannot_be_quantized_leaves_an_earlier_output_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = float_experts(tmp_path / "model", "per_expert")
    convert(root, "quark", tmp_path / "out", "missing")
    before = snapshot(tmp_path / "out")
    float_experts(tmp_path / "model", "per_expert", lambda tensors: tensors[FIRST_UP][0].zero_())
    arguments = ("convert", root, "--to", "quark", "--quantize", "missing", "--out", tmp_path / "out", "--overwrite")
    code, _, err = run_cli(capsys, *arguments)
    assert (code, FIRST_UP in err) == (4, True)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("target", ["fused-int8", "quark"])
def test_each_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, jobs: int) -> None:
    root = float_experts(tmp_path / "model", "per_expert")
    read: Counter[str] = Counter()
    fill = SourceFiles.fill

    def counted(self: SourceFiles, source: Copy, offset: int, view: memoryview) -> None:
        read[source.tensor] += len(view)
        fill(self, source, offset, view)

    monkeypatch.setattr(SourceFiles, "fill", counted)
    quarkconv.convert_checkpoint(root, target, tmp_path / "out", quantize="missing", jobs=jobs, max_shard_size=2_000)
    experts = {name: tensor.nbytes for name, tensor in load(root).items() if ".experts." in name}
    assert {name: read[name] for name in experts} == experts


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    int8 = make_checkpoint(tmp_path / "int8")
    with pytest.raises(UnsupportedError, match="Nothing to quantize"):
        quarkconv.plan_conversion(int8, "quark", quantize="missing")
    with pytest.raises(UnsupportedError, match="--quantize does not support this target"):
        quarkconv.plan_conversion(float_experts(tmp_path / "a"), "bf16", quantize="missing")
    static = float_experts(tmp_path / "b")
    config = json.loads((static / "config.json").read_text())
    config["quantization_config"]["global_quant_config"]["input_tensors"]["is_dynamic"] = False
    config["quantization_config"]["global_quant_config"]["input_tensors"]["qscheme"] = "per_tensor"
    (static / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="does not quantize to"):
        quarkconv.plan_conversion(static, "quark", quantize="missing")


def test_a_transposed_layout_is_refused(tmp_path: Path) -> None:
    def transpose(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    root = float_experts(tmp_path / "model", change=transpose)
    with pytest.raises(UnsupportedError, match="transposed"):
        quarkconv.plan_conversion(root, "quark", quantize="missing")


def test_missing_needs_a_config_that_declares_modules(bf16: Path) -> None:
    with pytest.raises(UnsupportedError, match="declares no module quantized") as caught:
        quarkconv.plan_conversion(bf16, "quark", quantize="missing")
    assert "--quantize all" in (caught.value.hint or "")


@pytest.mark.parametrize("mode", ["missing", "all"])
@pytest.mark.parametrize(
    ("export", "tensor", "message"),
    [
        ("dbrx-0.13-f2f", "transformer.blocks.0.ffn.experts", "tensors of experts with unknown names"),
        ("llama4-0.13-f2f", "model.layers.0.feed_forward.experts.gate_up_proj", "transposed"),
        ("gpt_oss-0.13-f2f", "model.layers.0.mlp.experts.gate_up_proj", "transposed"),
    ],
)
def test_experts_of_other_layouts_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], export: str, tensor: str, message: str, mode: str
) -> None:
    root = restore(FAMILIES / export, tmp_path / "model")
    before = snapshot(tmp_path)
    arguments = ("convert", root, "--to", "fused-int8", "--quantize", mode, "--out", tmp_path / "out")
    code, _, err = run_cli(capsys, *arguments)
    assert code == 4
    assert tensor in err
    assert message in " ".join(err.split())
    assert snapshot(tmp_path) == before


IMPORTED = """
import sys
from quarkconv.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
sys.exit(any(name in sys.modules for name in ("torch", "triton")))
"""


def test_quantizing_imports_no_torch(tmp_path: Path, bf16: Path) -> None:
    arguments = ("convert", bf16, "--to", "fused-int8", "--quantize", "all", "--out", tmp_path / "out")
    process = start(IMPORTED, *arguments)
    _, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 0, err
    assert (tmp_path / "out" / "config.json").exists()


def test_a_plan_that_quantizes_survives_json(bf16: Path) -> None:
    plan = quarkconv.plan_conversion(bf16, "fused-int8", quantize="all")
    assert quarkconv.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


class Memory:
    """Source bytes of one value."""

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:  # noqa: ARG002
        view[:] = b"\x3f" * len(view)


def test_scales_are_waited_for_until_the_conversion_stops() -> None:
    rows = Copy("weight", "file", 0, 16)
    pieces = (Codes(rows, "BF16", 4), RowScales(rows, "BF16", 4))
    shard = OutputShard(
        "file", 0, (OutputTensor("codes", "I8", (2, 4), pieces[:1]), OutputTensor("scales", "F32", (2,), pieces[1:]))
    )
    stop = threading.Event()
    held = HeldScales([shard], stop)
    assert list(held.reads(pieces)) == [rows]
    threading.Timer(0.3, held.hold, (rows, b"scales")).start()
    assert held.take(rows) == b"scales"
    stop.set()
    with pytest.raises(InterruptedByUser):
        held.take(rows)
    assert not HeldScales([OutputShard("file", 0, shard.tensors[1:])]).expects(rows)


def test_by_rank_nothing_is_written_when_the_last_rank_has_a_bad_row(tmp_path: Path) -> None:
    last = "model.layers.0.mlp.experts.2.down_proj.weight"
    root = float_experts(tmp_path / "model", "per_expert", lambda tensors: tensors[last][4].zero_())
    with pytest.raises(UnsupportedError, match="cannot be quantized") as caught:
        quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out", quantize="missing", ep=3)
    assert caught.value.tensor == last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [Codes, RowScales])
def test_memory_does_not_grow_with_the_weight(kind: Any) -> None:
    piece = kind(Copy("weight", "file", 0, 2 * 8192 * 4096), "BF16", 4096)
    next(iter(transformed(piece, Memory())))
    tracemalloc.start()
    total = sum(len(block) for block in transformed(piece, Memory()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == piece.output_nbytes
    assert peak < 8 * 2**20 < piece.source.nbytes


ATTENTION = ("*.self_attn.*", r"re:.*\.self_attn\.", "model.layers.0.self_attn.[qkvo]_proj")


@pytest.mark.parametrize("pattern", ATTENTION)
@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "ascend", "quark"])
def test_excluded_modules_stay_float_and_are_named(tmp_path: Path, bf16: Path, target: str, pattern: str) -> None:
    result = quarkconv.convert_checkpoint(bf16, target, tmp_path / "out", quantize="all", exclude=[pattern], jobs=2)
    output, source = load(result.output), load(bf16)
    left = [name for name in source if "self_attn" in name and name.endswith("_proj.weight")]
    assert len(left) == 4
    for name in left:
        assert torch.equal(output[name], source[name])
    description = quarkconv.inspect_checkpoint(result.output).description
    assert not description.errors()
    (finding,) = (item for item in result.plan.losses if item.code == "left-in-float")
    assert finding.count == len(left) + 1  # and the router
    assert "model.layers.*.self_attn.q_proj" in finding.message
    assert "model.layers.*.mlp.gate" in finding.message


def test_a_layer_of_experts_can_be_excluded(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", layers=2, shards=1)
    tensors = load(root)
    for name in [name for name in tensors if "_scale" in name]:
        del tensors[name]
    floats = {name: t.bfloat16() / 64 + 0.001 if t.dtype == torch.int8 else t for name, t in tensors.items()}
    save_file(floats, root / "model.safetensors", metadata={"format": "pt"})
    (root / "model.safetensors.index.json").unlink(missing_ok=True)
    for path in root.glob("model-*.safetensors"):
        path.unlink()
    output = quarkconv.convert_checkpoint(
        root, "fused-int8", tmp_path / "out", quantize="all", exclude=["model.layers.1.mlp.experts.*"]
    ).output
    assert "model.layers.0.mlp.experts.gate_up_proj" in load(output)
    assert torch.equal(load(output)[EXCLUDED_UP], floats[EXCLUDED_UP])
    assert not quarkconv.inspect_checkpoint(output).description.errors()


EXCLUDED_UP = "model.layers.1.mlp.experts.0.up_proj.weight"

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "without --quantize": ({"exclude": ["lm_head"]}, "--exclude has no effect without --quantize"),
    "a pattern that matches nothing": ({"quantize": "all", "exclude": ["*.q_porj"]}, "matches no module"),
    "an expression that does not compile": ({"quantize": "all", "exclude": ["re:("]}, "Invalid --exclude"),
    "a part of a merged linear": ({"quantize": "all", "exclude": ["*.q_proj"]}, "one part of a linear"),
    "an unknown mode": ({"quantize": "some"}, "Invalid --quantize"),
    "a string": ({"quantize": "all", "exclude": "lm_head"}, "Invalid `exclude`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_make_no_sense_are_refused(bf16: Path, case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        quarkconv.plan_conversion(bf16, "fused-int8", **options)
