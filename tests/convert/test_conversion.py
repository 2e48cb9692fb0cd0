"""One conversion for the API, the command line and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.program import snapshot
from support.progress import Recorder

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.jobs import MAX_JOBS
from quarkconv.convert.options import Options
from quarkconv.errors import UsageError
from quarkconv.hub.locate import locate


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", experts=4)


def test_preparing_writes_nothing_and_plans_what_plan_conversion_plans(model: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    conversion = Conversion.prepare(model, "fused-int8", options=Options(max_shard_size=9000))
    assert snapshot(tmp_path) == before
    assert [output.plan for output in conversion.outputs] == [
        quarkconv.plan_conversion(model, "fused-int8", max_shard_size=9000)
    ]
    assert conversion.location == tmp_path / "model-fused-int8" == conversion.outputs[0].folder
    assert not conversion.by_rank


def test_one_rank_is_a_whole_model(model: Path, tmp_path: Path) -> None:
    whole = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "whole").output
    one = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "one", tp=1, ep=1).output
    assert snapshot(whole) == snapshot(one)


def test_a_result_holds_plan_and_manifest_of_every_rank(model: Path, tmp_path: Path) -> None:
    result = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out", ep=2)
    assert result.source == model
    assert [output.folder.name for output in result.outputs] == ["rank-00-of-02", "rank-01-of-02"]
    for number, (output, manifest) in enumerate(zip(result.outputs, result.manifests, strict=True)):
        assert output.plan == quarkconv.plan_conversion(model, "fused-int8", ep=2, rank=number)
        assert {shard.file for shard in manifest.shards} == {shard.file for shard in output.plan.shards}
    assert (result.plan, result.manifest) == (result.outputs[0].plan, result.manifests[0])


@pytest.mark.parametrize(
    "options", [{"tp": 2, "ep": 2}, {"tp": 0}, {"ep": -1}, {"ep": 2000}, {"tp": 2, "rank": 2}, {"rank": 1}]
)
def test_ranks_that_do_not_exist_are_refused(model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        quarkconv.plan_conversion(model, "fused-int8", **options)


@pytest.mark.parametrize("jobs", [0, MAX_JOBS + 1])
def test_jobs_out_of_range_are_refused(model: Path, tmp_path: Path, jobs: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["name", "org/name@main", "org/", "a/b/c", ""])
def test_an_invalid_repo_id_is_refused_before_the_model_is_read(tmp_path: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="Invalid repo id"):
        Conversion.prepare(tmp_path / "nothing", "fused-int8", push=repo)


@pytest.mark.parametrize("options", [{}, {"tp": 2}])
def test_progress_is_a_step_of_reading_and_one_of_writing(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recorder = Recorder()
    result = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out", progress=recorder, **options)
    assert [(step.name, step.unit) for step in recorder.steps] == [
        ("Reading headers", "shard"),
        ("Converting to fused-int8", "byte"),
    ]
    writing = recorder.steps[-1]
    assert writing.total == sum(writing.advances) == sum(output.plan.output_bytes for output in result.outputs)


def test_a_directory_is_located_without_a_repo(model: Path) -> None:
    found = locate(model)
    assert (found.directory, found.repo, found.origin) == (model, None, model)
