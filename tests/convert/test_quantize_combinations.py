"""--quantize with ranks, parts, kills, a disk that fills, and sources that it does not read."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import Tensors, assert_same_tensors, float_experts, load, make_checkpoint
from support.conversions import SMALL_STEPS, assert_unfinished
from support.expected import part_of
from support.program import PROCESS_TIMEOUT, run_cli, snapshot, start
from support.progress import FullDisk

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.convert.results import Outcome
from quarkconv.errors import UnsupportedError, WriteError
from quarkconv.plan.pieces import CodeColumns, RowScales
from quarkconv.write import joining
from quarkconv.write.modes import Join
from quarkconv.write.quantizing import check_rows
from quarkconv.write.source import Reader

SHARD = 20_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in BF16, without a quantization config."""
    folder = tmp_path_factory.mktemp("float")
    int8 = make_checkpoint(folder / "int8", layers=2, experts=4, hidden=64, intermediate=48)
    return quarkconv.convert_checkpoint(int8, "bf16", folder / "model").output


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized in one go."""
    return convert(source, tmp_path_factory.mktemp("whole") / "out")


def convert(source: Path | str, out: Path, **options: Any) -> Path:
    options = {"quantize": "all", "max_shard_size": SHARD, "jobs": 1, **options}
    return quarkconv.convert_checkpoint(source, "fused-int8", out, **options).output


def changed(folder: Path, source: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a model in one file, with other tensors."""
    folder.mkdir()
    tensors = load(source)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(("parallel", "world_size"), [("tp", 2), ("tp", 3), ("tp", 8), ("ep", 2), ("ep", 3)])
def test_ranks_have_the_slices_of_the_whole_model(
    source: Path, whole: Path, tmp_path: Path, parallel: str, world_size: int
) -> None:
    out = convert(source, tmp_path / "out", **{parallel: world_size}, jobs=3)
    for rank in range(world_size):
        folder = out / f"rank-{rank:02d}-of-{world_size:02d}"
        assert_same_tensors(load(folder), part_of(load(whole), parallel, rank, world_size))


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
def test_columns_of_down_have_the_scale_of_the_whole_row(tmp_path: Path, layout: str) -> None:
    """The largest value of each row of down lies in the part of another rank."""

    def enlarge(tensors: Tensors) -> None:
        for name in (name for name in tensors if ("down_proj" in name and "experts" in name) or ".moe.down" in name):
            tensors[name][..., -1] = 100

    root = float_experts(tmp_path / "model", layout, enlarge)
    whole = load(convert(root, tmp_path / "whole", quantize="missing"))
    down = [tensor for name, tensor in whole.items() if name.endswith("experts.down_proj")]
    assert down
    assert all((codes[..., :-1].abs() <= 1).all() and (codes[..., -1] == 127).all() for codes in down)
    out = convert(root, tmp_path / "out", quantize="missing", tp=4)
    for rank in range(4):
        assert_same_tensors(load(out / f"rank-{rank:02d}-of-04"), part_of(whole, "tp", rank, 4))


@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_a_rank_is_verified_against_the_float_source(source: Path, tmp_path: Path, parallel: str) -> None:
    out = convert(source, tmp_path / "out", **{parallel: 2})
    folder = out / "rank-01-of-02"
    assert quarkconv.verify_checkpoint(folder, source, "cpu", tokens=2).ok
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert not quarkconv.verify_checkpoint(folder, source, "cpu", tokens=2).ok


def test_rows_are_checked_once_for_all_ranks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: Counter[str] = Counter()

    def counted(piece: RowScales, reader: Reader) -> None:
        checked[piece.source.tensor] += piece.source.nbytes
        check_rows(piece, reader)

    monkeypatch.setattr("quarkconv.write.quantizing.check_rows", counted)
    convert(source, tmp_path / "out", tp=4)
    tensors = load(source)
    assert {name for name in tensors if ".experts." in name} <= checked.keys()
    assert {name: tensors[name].nbytes for name in checked} == checked


def test_a_plan_of_columns_survives_json(source: Path) -> None:
    plan = quarkconv.plan_conversion(source, "fused-int8", quantize="all", tp=3, rank=1)
    pieces = [piece for shard in plan.shards for tensor in shard.tensors for piece in tensor.pieces]
    assert any(isinstance(piece, CodeColumns) for piece in pieces)
    assert quarkconv.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_parts_give_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--quantize", "all", "--max-shard-size", str(SHARD), "--out", tmp_path / "out")
    for part in ("2/3", "3/3", "1/3"):
        assert not (tmp_path / "out" / "config.json").exists()
        code, _, err = run_cli(capsys, "convert", source, "--to", "fused-int8", *options, "--part", part)
        assert code == 0, err
    assert snapshot(tmp_path / "out") == snapshot(whole)


def test_joined_workers_give_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "POLL_SECONDS", 0.1)
    options = Options(quantize="all", max_shard_size=SHARD)

    def work(_: int) -> Outcome:
        return Conversion.prepare(source, "fused-int8", tmp_path / "out", options).carry_out(Join(), jobs=2)

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(work, range(3)))
    assert sum(outcome.shards for outcome in outcomes) == len(list(whole.glob("*.safetensors")))
    assert snapshot(tmp_path / "out") == snapshot(whole)


def test_joined_workers_name_a_row_that_cannot_be_quantized(source: Path, tmp_path: Path) -> None:
    model = changed(tmp_path / "model", source, lambda tensors: tensors[BAD][7, 3].fill_(float("nan")))
    conversion = Conversion.prepare(model, "fused-int8", tmp_path / "out", Options(quantize="all"))
    with pytest.raises(UnsupportedError, match="cannot be quantized") as caught:
        conversion.carry_out(Join())
    assert caught.value.tensor == BAD
    assert_unfinished(tmp_path / "out")


BAD = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_a_part_names_a_row_that_cannot_be_quantized(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed(tmp_path / "model", source, lambda tensors: tensors[BAD][7, 3].fill_(float("inf")))
    options = ("--quantize", "all", "--max-shard-size", str(SHARD), "--out", tmp_path / "out")
    codes, errors = [], ""
    for part in ("1/2", "2/2"):
        code, _, err = run_cli(capsys, "convert", model, "--to", "fused-int8", *options, "--part", part)
        codes.append(code)
        errors += err
    assert 4 in codes
    assert BAD in errors
    assert "row 7" in errors
    assert_unfinished(tmp_path / "out")


def test_a_disk_that_fills_loses_nothing(source: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteError):
        convert(source, tmp_path / "out", progress=FullDisk(3))
    assert list((tmp_path / "out").rglob("files/*.safetensors"))
    assert_unfinished(tmp_path / "out")
    assert snapshot(convert(source, tmp_path / "out")) == snapshot(whole)


KILLED = (
    SMALL_STEPS
    + """
limit, calls, write = int(sys.argv[1]), 0, os.pwrite

def counted(*args):
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)

os.pwrite = counted
main(sys.argv[2:])
"""
)


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_killed_it_resumes_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path, limit: int) -> None:
    sizes = ("--max-shard-size", SHARD, "--out", tmp_path / "out")
    process = start(KILLED, limit, "convert", source, "--to", "fused-int8", "--quantize", "all", *sizes)
    process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert_unfinished(tmp_path / "out")
    assert snapshot(convert(source, tmp_path / "out")) == snapshot(whole)


KILLED_IN_RANK_1 = (
    SMALL_STEPS
    + """
write = os.pwrite

def in_rank_1(descriptor, *args):
    if "rank-01" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, *args)

os.pwrite = in_rank_1
main(sys.argv[1:])
"""
)


def test_killed_between_ranks_it_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole = snapshot(convert(source, tmp_path / "whole", tp=2))
    options = ("--quantize", "all", "--tp", "2", "--max-shard-size", SHARD, "--out", tmp_path / "out")
    process = start(KILLED_IN_RANK_1, "convert", source, "--to", "fused-int8", *options)
    process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "rank-00-of-02" / "config.json").exists()
    assert not (tmp_path / "out" / "ranks.json").exists()
    assert snapshot(convert(source, tmp_path / "out", tp=2)) == whole


def blocks(tensors: Tensors) -> None:
    """Weights in FP8 with a scale for each block, as DeepSeek publishes them."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


@pytest.mark.parametrize("mode", ["missing", "all"])
def test_weights_in_fp8_are_refused_by_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    model = changed(tmp_path / "model", source, blocks)
    config = json.loads((model / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    before = snapshot(tmp_path)
    arguments = ("convert", model, "--to", "fused-int8", "--quantize", mode, "--out", tmp_path / "out")
    code, _, err = run_cli(capsys, *arguments)
    assert code == 4
    assert "F8_E4M3" in err
    assert "_proj" in err
    assert snapshot(tmp_path) == before


def test_a_float_expert_beside_int8_ones_of_its_layer_is_quantized(source: Path, whole: Path, tmp_path: Path) -> None:
    quark = quarkconv.convert_checkpoint(source, "quark", tmp_path / "quark", quantize="all").output
    module = "model.layers.0.mlp.experts.2.down_proj"

    def restore(tensors: Tensors) -> None:
        del tensors[f"{module}.weight_scale"]
        tensors[f"{module}.weight"] = load(source)[f"{module}.weight"]

    model = changed(tmp_path / "model", quark, restore)
    with pytest.raises(UnsupportedError, match="mixes experts"):
        quarkconv.plan_conversion(model, "fused-int8")
    output = convert(model, tmp_path / "out", quantize="missing")
    found, expected = load(output), load(whole)
    for name in (name for name in expected if ".experts." in name):
        assert torch.equal(found[name], expected[name]), name
