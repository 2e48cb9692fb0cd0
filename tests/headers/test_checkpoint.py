"""Opening a directory: which files make up the model, and what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import with_class
from support.model import FIRST, SECOND, Model
from support.moe_model import INDEX
from support.program import run_cli
from support.raw import entry, raw_file, write_json

import quarkconv
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.files.json_files import read_json_object
from quarkconv.headers.checkpoint import Checkpoint, open_checkpoint
from quarkconv.tune.shapes import checkpoint_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Model().write(tmp_path / "model")


def codes(checkpoint: Checkpoint) -> list[str]:
    return [item.code for item in checkpoint.findings]


def only_finding(checkpoint: Checkpoint, code: str) -> str:
    """The message and hint of the one finding."""
    assert codes(checkpoint) == [code]
    return f"{checkpoint.findings[0].message} {checkpoint.findings[0].hint}"


def test_a_sound_checkpoint_has_no_findings(folder: Path) -> None:
    model = Model()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.findings == ()
    assert checkpoint.config == with_class(model.config)
    assert [shard.file for shard in checkpoint.shards] == [FIRST, SECOND]
    tensors = model.first | model.second
    assert {name: shape for name, (_, shape) in checkpoint.types.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert checkpoint.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_refs_are_the_bytes_of_the_tensors(folder: Path) -> None:
    model = Model()
    refs = open_checkpoint(folder).refs()
    assert set(refs) == set(model.first) | set(model.second)
    for shard, file in ((model.first, FIRST), (model.second, SECOND)):
        raw = (folder / file).read_bytes()
        for name, tensor in shard.items():
            assert refs[name].file == file
            assert raw[refs[name].start : refs[name].end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_files_are_listed_without_those_of_hidden_folders(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").touch()
    (folder / ".gitattributes").touch()
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").touch()
    assert [str(path) for path in open_checkpoint(folder).files()] == [
        ".gitattributes", "config.json", "figures/a.png", FIRST, SECOND, INDEX,
    ]  # fmt: skip


# Which files are the model


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter.safetensors")
    write_json(tmp_path / "config.json", {})
    checkpoint = open_checkpoint(tmp_path)
    assert [shard.file for shard in checkpoint.shards] == ["model.safetensors"]
    assert [(item.code, item.subject) for item in checkpoint.findings] == [("file-conflict", "adapter.safetensors")]


def test_shards_without_an_index_are_read(folder: Path) -> None:
    (folder / INDEX).unlink()
    checkpoint = open_checkpoint(folder)
    assert [shard.file for shard in checkpoint.shards] == [FIRST, SECOND]
    assert checkpoint.findings == ()


def test_a_file_that_the_index_does_not_name_is_not_read(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"garbage")
    (folder / "b.safetensors").write_bytes(b"garbage")
    checkpoint = open_checkpoint(folder)
    assert "2 safetensors files" in only_finding(checkpoint, "file-unused")
    assert (checkpoint.findings[0].subject, checkpoint.findings[0].count) == ("a.safetensors", 2)


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="model directory does not exist") as caught:
        open_checkpoint(tmp_path / "model")
    assert caught.value.file == str(tmp_path / "model")


def test_a_file_is_refused_with_the_directory_that_holds_it(folder: Path) -> None:
    with pytest.raises(SourceError, match="The model is a file") as caught:
        open_checkpoint(folder / FIRST)
    assert (caught.value.file, caught.value.hint) == (str(folder / FIRST), f"give its directory: {folder}")


@pytest.mark.parametrize(("latest", "named"), [("b2", "b2"), ("gone", "a1"), (None, "a1")])
def test_a_folder_of_the_hubs_cache_names_its_snapshot(latest: str | None, named: str, tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    for commit in ("a1", "b2"):
        (root / "snapshots" / commit).mkdir(parents=True)
    if latest is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(latest)
    with pytest.raises(SourceError, match="no safetensors file") as caught:
        open_checkpoint(root)
    assert str(caught.value.hint).endswith(f"give {root / 'snapshots' / named}")


def test_a_folder_of_the_hubs_cache_without_snapshots_names_none(tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    (root / "snapshots").mkdir(parents=True)
    with pytest.raises(SourceError, match="no safetensors file") as caught:
        open_checkpoint(root)
    assert "snapshot" not in str(caught.value.hint)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    with pytest.raises(SourceError, match="no safetensors file") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.found == "no *.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-Q4_K_M.gguf", "consolidated.00.pth"])
@pytest.mark.parametrize("config", [True, False])
def test_weights_in_another_format_are_unsupported_and_not_damaged(
    tmp_path: Path, name: str, config: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / name).touch()
    if config:
        write_json(model / "config.json", {"model_type": "mixtral", "num_local_experts": 8})
    (found,) = open_checkpoint(model).findings
    assert (found.code, found.subject) == ("format-unsupported", name)
    for words, code in (
        (("inspect",), 1),
        (("convert", "--to", "bf16", "--out", tmp_path / "out"), 4),
        (("convert", "--to", "fused-int8", "--quantize", "all", "--out", tmp_path / "out"), 4),
        (("verify",), 4),
        (("evaluate", "--text", __file__), 4),
        (("verify", "--bytes-only"), 4),
    ):
        status, out, err = run_cli(capsys, words[0], model, *words[1:])
        assert (status, name in out + err) == (code, True), (words, out, err)
    with pytest.raises(UnsupportedError, match="in other formats") as caught:
        quarkconv.load_fused_experts(model, 0)
    assert caught.value.file == str(model / name)
    with pytest.raises(UnsupportedError, match="in other formats"):
        checkpoint_shapes(str(model))


def test_files_of_a_training_run_are_no_weights(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="no safetensors file"):
        open_checkpoint(tmp_path)


def test_an_adapter_is_recognised(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    message = only_finding(open_checkpoint(folder), "config-invalid")
    assert "does not exist" in message
    assert "merge it into its base model" in message


def test_an_unfinished_conversion_is_not_a_model(folder: Path) -> None:
    (folder / ".quarkconv").mkdir()
    with pytest.raises(SourceError, match="unfinished conversion") as caught:
        open_checkpoint(folder)
    assert caught.value.hint is not None
    assert "resumes" in caught.value.hint


# Damaged files: the rest is still described


def test_the_rest_of_a_working_folder_beside_a_finished_conversion_is_no_obstacle(folder: Path) -> None:
    (folder / ".quarkconv" / "notes").mkdir(parents=True)
    with pytest.raises(SourceError, match="unfinished conversion"):
        open_checkpoint(folder)
    (folder / "quarkconv.json").write_text("{}")
    assert open_checkpoint(folder).findings == ()
    (folder / ".quarkconv" / "plan.json").write_text("{")
    with pytest.raises(SourceError, match="unfinished conversion"):
        open_checkpoint(folder)


def test_a_missing_shard_is_found(folder: Path) -> None:
    (folder / SECOND).unlink()
    checkpoint = open_checkpoint(folder)
    only_finding(checkpoint, "shard-missing")
    assert checkpoint.findings[0].subject == SECOND
    assert set(checkpoint.types) == set(Model().first)


@pytest.mark.parametrize("lost", [1, 100])
def test_a_truncated_shard_is_found(lost: int, folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - lost)
    checkpoint = open_checkpoint(folder)
    assert f"{lost} byte" in only_finding(checkpoint, "shard-truncated")
    ends = {name: ref.end for name, ref in checkpoint.refs().items() if ref.file == SECOND}
    size = (folder / SECOND).stat().st_size
    assert checkpoint.findings[0].count == sum(end > size for end in ends.values()) > 0
    assert checkpoint.tensor_bytes == sum(t.nbytes for t in (Model().first | Model().second).values())


@pytest.mark.parametrize("keep", [0, 5, 8, 20])
def test_a_shard_cut_in_its_header_is_found(keep: int, folder: Path) -> None:
    os.truncate(folder / SECOND, keep)
    checkpoint = open_checkpoint(folder)
    only_finding(checkpoint, "shard-truncated")
    assert [shard.file for shard in checkpoint.shards] == [FIRST]


def test_a_header_that_is_not_valid_names_file_and_tensor(folder: Path) -> None:
    (folder / SECOND).write_bytes(raw_file({"weight": entry("I9", [1], 0, 1)}, b"1"))
    checkpoint = open_checkpoint(folder)
    assert "tensor weight" in only_finding(checkpoint, "header-invalid")
    assert checkpoint.findings[0].subject == SECOND


@pytest.mark.parametrize(("dtype", "plausible"), [("F8_E3M4", True), ("I2", True), ("i8", False), ("?", False)])
def test_a_dtype_that_is_not_read_may_be_of_a_newer_format(dtype: str, plausible: bool, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    (found,) = [item for item in open_checkpoint(tmp_path).findings if item.code == "header-invalid"]
    assert ("newer version of the format" in found.hint) is plausible
    assert ("again" in found.hint) is not plausible


def test_a_shard_that_is_a_directory(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    only_finding(open_checkpoint(folder), "shard-missing")


def test_no_shard_can_be_read(folder: Path) -> None:
    for file in (FIRST, SECOND):
        (folder / file).write_bytes(b"not safetensors")
    checkpoint = open_checkpoint(folder)
    assert codes(checkpoint) == ["header-invalid", "header-invalid"]
    assert checkpoint.types == {}
    assert checkpoint.tensor_bytes == 0


# Indexes

BAD_INDEXES: dict[str, str | bytes] = {
    "empty": "",
    "not JSON": "{",
    "not UTF-8": b'{"weight_map": {"a": "\xff.safetensors"}}',
    "a list": "[]",
    "no weight_map": '{"metadata": {"total_size": 1}}',
    "weight_map null": '{"weight_map": null}',
    "weight_map a list": '{"weight_map": []}',
    "nested 100,000 deep": "[" * 100_000,
    **{
        f"names {file!r}": json.dumps({"weight_map": {"a": file}})
        for file in (
            1, None, "", ".", "..", "/etc/passwd", "/x.safetensors", "../x.safetensors", "sub/../x.safetensors",
            "..\\x.safetensors", "weights.bin", "config.json", ["x.safetensors"],
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_invalid_index_is_ignored(name: str, folder: Path) -> None:
    text = BAD_INDEXES[name]
    (folder / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    checkpoint = open_checkpoint(folder)
    only_finding(checkpoint, "index-invalid")
    assert checkpoint.findings[0].subject == INDEX
    assert [shard.file for shard in checkpoint.shards] == [FIRST, SECOND]


def test_an_empty_index_is_invalid(folder: Path) -> None:
    write_json(folder / INDEX, {"weight_map": {}})
    checkpoint = open_checkpoint(folder)
    assert [(item.code, item.count) for item in checkpoint.findings] == [("index-invalid", 1)]
    assert [shard.file for shard in checkpoint.shards] == [FIRST, SECOND]


@pytest.mark.parametrize("file", ["a\0b.safetensors", "\ud800.safetensors", "new\nline.safetensors"])
def test_an_index_that_names_a_file_that_cannot_be(file: str, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    write_json(folder / INDEX, index)
    assert "shard-missing" in codes(open_checkpoint(folder))


def test_tensors_of_a_missing_shard_are_not_a_mismatch(folder: Path) -> None:
    (folder / FIRST).unlink()
    assert codes(open_checkpoint(folder)) == ["shard-missing"]


def test_a_tensor_in_another_file_than_the_index_says(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name in ("lm_head.weight", "model.norm.weight"):
        index["weight_map"][name] = SECOND
    write_json(folder / INDEX, index)
    checkpoint = open_checkpoint(folder)
    message = only_finding(checkpoint, "index-mismatch")
    assert checkpoint.findings[0].count == 2
    assert f"the first in {SECOND}, but {FIRST} holds it" in message


def test_a_tensor_that_only_the_index_knows(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = FIRST
    write_json(folder / INDEX, index)
    message = only_finding(open_checkpoint(folder), "index-mismatch")
    assert f"the first in {FIRST}" in message
    assert ": model.ghost.weight" in message
    assert "no file holds it" in message


def test_the_same_shard_under_two_names_is_one_finding(folder: Path) -> None:
    (folder / INDEX).unlink()
    shutil.copy(folder / SECOND, folder / "model-copy.safetensors")
    checkpoint = open_checkpoint(folder)
    message = only_finding(checkpoint, "tensor-duplicate")
    assert checkpoint.findings[0].count == len(Model().second)
    assert SECOND in message
    assert "model-copy.safetensors" in message


# config.json

BAD_CONFIGS = {
    "empty": b"",
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "not JSON": b"{model}",
    "not UTF-8": b'{"model_type": "\xff"}',
    "nested 100,000 deep": b'{"a":' * 100_000,
    "a huge number": b'{"a":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_an_invalid_config_leaves_the_tensors(name: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(BAD_CONFIGS[name])
    checkpoint = open_checkpoint(folder)
    only_finding(checkpoint, "config-invalid")
    assert checkpoint.findings[0].subject == "config.json"
    assert checkpoint.config == {}
    assert len(checkpoint.shards) == 2


def test_a_config_that_is_a_directory(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    only_finding(open_checkpoint(folder), "config-invalid")


def test_a_config_of_a_gigabyte_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", 2**30)
    assert "too large" in only_finding(open_checkpoint(folder), "config-invalid")


def test_the_limit_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path, code="config-invalid", limit=8) == {"a": 1}
    with pytest.raises(SourceError, match="too large"):
        read_json_object(path, code="config-invalid", limit=7)
