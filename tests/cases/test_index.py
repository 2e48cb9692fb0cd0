"""Indexes that users reported: files left out, files that do not exist, and stale ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.model import FIRST, SECOND, Model
from support.moe_model import INDEX
from support.reported import codes, finding, load_shard, losses, refusal

from quarkconv import QuarkconvError, convert_checkpoint, verify_checkpoint
from quarkconv.targets import TARGETS

# An index that leaves out files, or names files that do not exist


def test_a_file_that_the_index_does_not_name_is_reported_by_convert(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    save_file({"mtp.norm.weight": torch.ones(8)}, source / "model-mtp.safetensors")
    assert codes(source) == {"file-unused": "warning"}
    for target in TARGETS:
        assert losses(source, target)["file-unused"] == ["model-mtp.safetensors"]


def test_a_file_that_the_index_does_not_name_is_reported_by_verify(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    save_file({"mtp.norm.weight": torch.ones(8)}, source / "model-mtp.safetensors")
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    for result in (verify_checkpoint(source, device="cpu"), verify_checkpoint(out, source, device="cpu")):
        assert result.ok
        assert [(item.code, item.subject) for item in result.findings] == [("file-unused", "model-mtp.safetensors")]
        assert result.to_json()["findings"][0]["subject"] == "model-mtp.safetensors"
    assert verify_checkpoint(out, device="cpu").findings == ()


@pytest.mark.parametrize("fault", ["an index without entries", "a file without tensors"])
def test_a_checkpoint_without_any_tensor_is_an_error(fault: str, tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    if fault == "an index without entries":
        (source / INDEX).write_text('{"weight_map": {}}')
    else:
        for path in (source / INDEX, source / FIRST, source / SECOND):
            path.unlink()
        save_file({}, source / "model.safetensors")
    code = "index-invalid" if "index" in fault else "experts-not-understood"
    assert (codes(source)[code], finding(source, code).hint != "") == ("error", True)
    for target in TARGETS:
        assert refusal(source, target).exit_code == (3 if "index" in fault else 4)


def test_verify_calls_an_index_without_its_files_damaged(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    index = json.loads((source / INDEX).read_text())
    stale = {name: file.replace("of-00002", "of-00004") for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps({"weight_map": stale}))
    with pytest.raises(QuarkconvError, match="shard-missing") as caught:
        verify_checkpoint(source, device="cpu")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("fault", ["unlisted tensor", "tensor in two files", "no index"])
def test_an_index_that_disagrees_with_its_files_is_found_by_every_command(fault: str, tmp_path: Path) -> None:
    model = Model()
    source = model.write(tmp_path / "source")
    if fault == "unlisted tensor":
        save_file({**load_shard(source / FIRST), "extra.weight": torch.ones(2, 2)}, source / FIRST)
    if fault == "tensor in two files":
        name = next(iter(model.second))
        save_file({**load_shard(source / FIRST), name: model.second[name]}, source / FIRST)
    if fault == "no index":
        (source / INDEX).unlink()
        assert codes(source) == {}
        assert convert_checkpoint(source, "fused-int8", tmp_path / "out").output.is_dir()
        assert verify_checkpoint(source, device="cpu").ok
        return
    code = {"unlisted tensor": "index-mismatch", "tensor in two files": "tensor-duplicate"}[fault]
    assert codes(source)[code] == "error"
    assert refusal(source, "fused-int8").exit_code == 3
    result = verify_checkpoint(source, device="cpu")
    assert code in result.problems[0].message
    assert result.numbers.skipped == "the structure is broken"


def test_a_stale_index_is_reported_without_conclusions_from_hidden_files(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    index = json.loads((source / INDEX).read_text())
    stale = {name: file.replace("of-00002", "of-00004") for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps({"weight_map": stale}))
    assert codes(source) == {"shard-missing": "error", "file-unused": "warning"}
    assert FIRST in finding(source, "shard-missing").hint
    error = refusal(source, "fused-int8")
    assert (error.exit_code, SECOND in (error.hint or "") or FIRST in (error.hint or "")) == (3, True)
