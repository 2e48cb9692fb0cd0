"""Experts divided among ranks, against slicing the whole tensors with torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import assert_same_tensors, load, make_checkpoint
from support.expected import fused_int8, part_of
from support.exports import Checkpoints
from support.program import run_cli, snapshot
from support.progress import WhileWriting

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.description.description import describe
from quarkconv.errors import SourceError, UnsupportedError, UsageError, WriteError
from quarkconv.experts.ranks import WHOLE, Rank, make_rank, rank_of_config
from quarkconv.plan.plan import Plan
from quarkconv.write.locks import OutputBusyError, lock_folder
from quarkconv.write.space import records_nbytes

STATIC = "qwen3_moe-quark0.11-eager-int8_static"
NAMES = ("qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "step3p5-like-3key_fused", STATIC)


def convert(source: Path, out: Path, parallel: str, world_size: int, **options: Any) -> Path:
    options = {parallel: world_size, "jobs": 1, **options}
    return quarkconv.convert_checkpoint(source, "fused-int8", out, **options).output


def interrupt_at(stops: Callable[[Path], bool], root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert for two ranks, and interrupt it before the first chosen file gets its name."""
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if stops(target):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(root, out, "tp", 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("parallel", "world_size"), [("tp", 2), ("tp", 4), ("ep", 2), ("ep", 3)])
def test_each_rank_has_the_slices_of_the_whole(
    checkpoints: Checkpoints, tmp_path: Path, name: str, parallel: str, world_size: int
) -> None:
    whole = fused_int8(checkpoints(name))
    out = convert(checkpoints(name), tmp_path / "out", parallel, world_size)
    for rank in range(world_size):
        folder = out / f"rank-{rank:02d}-of-{world_size:02d}"
        assert_same_tensors(load(folder), part_of(whole, parallel, rank, world_size))


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_every_kind_are_divided(tmp_path: Path, layout: str, granularity: str, dtype: torch.dtype) -> None:
    root = make_checkpoint(
        tmp_path / "model", layout=layout, granularity=granularity, scale_dtype=dtype, experts=5, intermediate=12
    )
    whole = load(quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "whole").output)
    for parallel, world_size in (("tp", 3), ("ep", 3)):
        out = convert(root, tmp_path / parallel, parallel, world_size)
        for rank in range(world_size):
            found = load(out / f"rank-{rank:02d}-of-03")
            assert_same_tensors(found, part_of(whole, parallel, rank, world_size))


@pytest.mark.parametrize("block", [1, 64, 1000])
def test_columns_are_the_same_however_many_rows_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("quarkconv.write.transforms.BLOCK_BYTES", block)
    root = make_checkpoint(tmp_path / "model")
    out = convert(root, tmp_path / "out", "tp", 4)
    for rank in range(4):
        assert_same_tensors(load(out / f"rank-{rank:02d}-of-04"), part_of(fused_int8(root), "tp", rank, 4))


def test_the_index_lists_the_parts_of_each_rank(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", experts=5)
    out = convert(root, tmp_path / "out", "ep", 3)
    index = json.loads((out / "ranks.json").read_text())
    manifests = [json.loads((out / f"rank-{rank:02d}-of-03" / "quarkconv.json").read_text()) for rank in range(3)]
    assert index == {
        "format": "quarkconv.ranks/1", "target": "fused-int8", "parallel": "ep", "world_size": 3,
        "experts": 5, "intermediate_size": 20,
        "ranks": [
            {"rank": rank, "folder": f"rank-{rank:02d}-of-03", "experts": ends, "intermediate": [0, 20],
             "plan": manifests[rank]["plan"]}
            for rank, ends in enumerate(([0, 2], [2, 4], [4, 5]))
        ],
    }  # fmt: skip
    tp = json.loads((convert(root, tmp_path / "tp", "tp", 2) / "ranks.json").read_text())
    assert [rank["intermediate"] for rank in tp["ranks"]] == [[0, 10], [10, 20]]
    assert [rank["experts"] for rank in tp["ranks"]] == [[0, 5], [0, 5]]


def test_the_config_of_a_rank_identifies_it(tmp_path: Path) -> None:
    out = convert(make_checkpoint(tmp_path / "model", experts=5), tmp_path / "out", "ep", 2)
    found = quarkconv.inspect_checkpoint(out / "rank-01-of-02")
    assert [item.code for item in found.findings] == ["rank-part"]
    assert found.ok
    assert found.engines == ()
    assert not any(support.supported for support in found.targets.values())
    with pytest.raises(UnsupportedError, match="part of one rank"):
        quarkconv.convert_checkpoint(out / "rank-01-of-02", "quark", tmp_path / "again")
    with pytest.raises(SourceError, match="several ranks") as caught:
        quarkconv.inspect_checkpoint(out)
    assert "rank-00-of-02" in (caught.value.hint or "")


def test_a_rank_is_verified_against_the_whole_source(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", experts=4)
    for parallel in ("tp", "ep"):
        out = convert(root, tmp_path / parallel, parallel, 2)
        folder = out / "rank-01-of-02"
        assert quarkconv.verify_checkpoint(folder, root, "cpu", tokens=2).ok
        shard = next(folder.glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        assert not quarkconv.verify_checkpoint(folder, root, "cpu", tokens=2).ok


@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_layers_of_float_experts_are_whole_in_every_rank(
    parallel: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints("glm4_moe-0.13-f2f-mtp_bf16")
    out = convert(source, tmp_path / "out", parallel, 2)
    layers = {layer.prefix: layer.experts for layer in describe(source).moe_layers if not layer.quantized}
    assert layers
    for folder in out.glob("rank-*"):
        assert quarkconv.verify_checkpoint(folder, source, "cpu", tokens=2).problems == ()
        found = describe(folder)
        assert {layer.prefix: layer.experts for layer in found.moe_layers if not layer.quantized} == layers
        assert "expert-count" not in {item.code for item in found.findings}


def test_a_plan_of_a_rank_survives_json(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    for number in range(2):
        plan = quarkconv.plan_conversion(root, "fused-int8", tp=2, rank=number)
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert plan.rank == Rank("tp", number, 2)
        assert plan.moe is not None
        assert plan.moe.intermediate_size == 10


def test_what_was_finished_is_not_written_again(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    whole = snapshot(convert(root, tmp_path / "whole", "tp", 2))
    conversion = Conversion.prepare(root, "fused-int8", tmp_path / "out", Options(tp=2))

    def stop(_: int) -> None:
        if (tmp_path / "out" / "rank-01-of-02").exists():
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, quarkconv.InterruptedByUser)):
        conversion.carry_out(jobs=1, progress=WhileWriting(stop))
    first = tmp_path / "out" / "rank-00-of-02" / "model-00001-of-00001.safetensors"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "ranks.json").exists()
    conversion.carry_out(jobs=1)
    assert first.stat().st_mtime_ns == written
    assert snapshot(tmp_path / "out") == whole


def test_killed_while_it_writes_the_index_the_same_call_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkpoint(tmp_path / "model")
    whole = snapshot(convert(root, tmp_path / "whole", "tp", 2))
    out = tmp_path / "out"
    interrupt_at(lambda target: target == out / "ranks.json", root, out, monkeypatch)
    assert sorted(path.name for path in out.iterdir()) == ["rank-00-of-02", "rank-01-of-02", "ranks.json.part"]
    convert(root, out, "tp", 2)
    assert snapshot(out) == whole


def test_files_of_a_rank_that_are_in_their_place_need_no_more_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkpoint(tmp_path / "model", hidden=256, intermediate=256, experts=8)
    whole = snapshot(convert(root, tmp_path / "whole", "tp", 2))
    out = tmp_path / "out"
    # When all else is in its place.
    interrupt_at(lambda path: path.name == "config.json" and path.parent.parent == out, root, out, monkeypatch)
    plans = [output.plan for output in Conversion.prepare(root, "fused-int8", out, Options(tp=2)).outputs]
    missing = sum(plan.output_bytes + records_nbytes(plan.shards) for plan in plans) - plans[0].output_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=missing))
    convert(root, out, "tp", 2)
    assert snapshot(out) == whole


def test_ranks_that_another_process_writes_are_not_deleted(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    out = convert(root, tmp_path / "out", "tp", 2)
    (out / "ranks.json").unlink()
    descriptor, _ = lock_folder(out / "rank-01-of-02" / ".quarkconv")
    before = snapshot(out)
    with pytest.raises(OutputBusyError, match="Another process"):
        convert(root, out, "tp", 2, overwrite=True)
    assert snapshot(out) == before
    os.close(descriptor)
    convert(root, out, "tp", 2, overwrite=True)
    assert (out / "ranks.json").is_file()


def test_the_space_of_all_ranks_is_checked_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_checkpoint(tmp_path / "model")
    conversion = Conversion.prepare(root, "fused-int8", tmp_path / "out", Options(tp=2))
    first = conversion.outputs[0].plan
    free = first.output_bytes + records_nbytes(first.shards)  # enough for one of them
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(WriteError, match="Not enough space"):
        conversion.carry_out()
    assert list((tmp_path / "out").iterdir()) == []


def test_other_things_in_the_output_are_not_touched(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    out = convert(root, tmp_path / "out", "tp", 2)
    for parallel, world_size in (("tp", 2), ("ep", 3)):
        with pytest.raises(UsageError, match="has other files"):
            convert(root, out, parallel, world_size)
    convert(root, out, "ep", 3, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [*(f"rank-0{n}-of-03" for n in range(3)), "ranks.json"]
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(UsageError, match="has other files"):
        convert(root, out, "tp", 2, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert snapshot(out) == before


def test_the_command_converts_for_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_checkpoint(tmp_path / "model")
    code, out, _ = run_cli(capsys, "convert", root, "--to", "fused-int8", "--tp", "2", "--dry-run", "--json")
    value = json.loads(out)
    assert code == 0
    assert value["dry_run"] is True
    assert not (tmp_path / "model-fused-int8-tp2").exists()
    code, out, _ = run_cli(capsys, "convert", root, "--to", "fused-int8", "--tp", "2")
    assert code == 0
    assert "rank-01-of-02" in out
    assert (tmp_path / "model-fused-int8-tp2" / "ranks.json").is_file()
    size = sum(
        path.stat().st_size for path in (tmp_path / "model-fused-int8-tp2").rglob("*") if path.suffix == ".safetensors"
    )
    assert size == value["bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "fused-int8", "--tp", "2", "--ep", "2"], 2, "exclude one another"),
        (["--to", "fused-int8", "--tp", "2", "--push", "org/name"], 2, "not uploaded"),
        (["--to", "fused-int8", "--tp", "3"], 4, "cannot be divided among 3 ranks"),
        (["--to", "fused-int8", "--ep", "4"], 4, "More ranks than experts"),
        (["--to", "quark", "--tp", "2"], 2, "target has no ranks"),
        (["--to", "fused-int8", "--tp", "1"], 2, "--tp"),
        (["--to", "fused-int8", "--tp", "5000"], 2, "rank is out of range"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    root = make_checkpoint(tmp_path / "model")
    found, _, err = run_cli(capsys, "convert", root, *arguments)
    assert (found, message in err) == (code, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("experts", [1, 7, 8, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_expert_belongs_to_one_rank(experts: int, world_size: int) -> None:
    parts = [Rank("ep", rank, world_size).experts(experts) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(experts))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    "value", [None, 3, {}, {"parallel": "tp"}, {"parallel": "pp", "rank": 0, "world_size": 2},
             {"parallel": "tp", "rank": 2, "world_size": 2}, {"parallel": "tp", "rank": True, "world_size": 2}],
)  # fmt: skip
def test_an_invalid_rank_in_a_config_is_ignored(value: object) -> None:
    assert rank_of_config({"quarkconv_rank": value}) == WHOLE


def test_a_whole_model_is_rank_0_of_1_and_its_config_has_no_rank(tmp_path: Path) -> None:
    plan = quarkconv.plan_conversion(make_checkpoint(tmp_path / "model"), "fused-int8")
    assert plan.rank == WHOLE
    assert plan.rank.is_whole
    assert rank_of_config(plan.config) == rank_of_config({}) == WHOLE
    assert "quarkconv_rank" not in plan.config
    assert not Rank("tp", 0, 2).is_whole


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError):
        make_rank("tp", -1, 2)
