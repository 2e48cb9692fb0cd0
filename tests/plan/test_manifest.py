"""The manifest: it covers every byte of the output, and nothing malformed is believed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints

import quarkconv
from quarkconv.errors import SourceError
from quarkconv.plan.manifest import manifest_to_bytes, read_manifest
from quarkconv.plan.pieces import Copy, Rows
from quarkconv.plan.plan import plan_digest

SOURCES = ("mixtral-quark0.11-eager", "qwen3_moe-quark0.11-eager-int8_static", "step3p5-like-3key_fused")


@pytest.fixture(scope="module", params=SOURCES)
def result(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> quarkconv.ConversionResult:
    out = tmp_path_factory.mktemp("manifest") / "out"
    return quarkconv.convert_checkpoint(checkpoints(request.param), "fused-int8", out, max_shard_size=100_000)


def test_a_manifest_that_is_read_and_written_again_is_the_same(result: quarkconv.ConversionResult) -> None:
    found = read_manifest(result.output)
    assert found == result.manifest
    assert manifest_to_bytes(result.manifest) == (result.output / "quarkconv.json").read_bytes()


def test_it_records_the_conversion(result: quarkconv.ConversionResult) -> None:
    value = json.loads((result.output / "quarkconv.json").read_text())
    assert isinstance(result.source, Path)
    config = json.loads((result.source / "config.json").read_text())
    assert value["format"] == "quarkconv.manifest/1"
    assert value["quarkconv"] == quarkconv.__version__
    assert value["plan"] == plan_digest(result.plan)
    assert (value["target"], value["checksum"]) == ("fused-int8", "xxh3-128")
    assert value["producer_version"] == config["quantization_config"]["version"]
    shards = sorted(result.source.glob("*.safetensors"))
    assert value["sources"] == [[shard.name, shard.stat().st_size] for shard in shards]
    inspection = quarkconv.inspect_checkpoint(result.source).to_json()
    assert value["scheme"] == inspection["scheme"]
    moe = dict(inspection["moe"])
    moe.pop("layout")
    assert {key: value["moe"][key] for key in moe} == moe


def test_every_byte_of_the_output_is_covered(result: quarkconv.ConversionResult) -> None:
    manifest = read_manifest(result.output)
    assert manifest is not None
    for shard in manifest.shards:
        data = (result.output / shard.file).read_bytes()
        assert len(data) == shard.size
        assert xxhash.xxh3_128_hexdigest(data[: shard.header]) == shard.header_checksum
        position = shard.header
        for tensor in shard.tensors:
            for piece, checksum in tensor.pieces:
                assert piece.output_nbytes > 0
                end = position + piece.output_nbytes
                assert xxhash.xxh3_128_hexdigest(data[position:end]) == checksum, tensor.name
                position = end
        assert position == shard.size
    for file in manifest.files:
        data = (result.output / file.name).read_bytes()
        assert (file.size, file.checksum) == (len(data), xxhash.xxh3_128_hexdigest(data))
    present = {path.relative_to(result.output).as_posix() for path in result.output.rglob("*") if path.is_file()}
    assert sorted(manifest.file_names()) == sorted(present)


def test_every_piece_is_what_torch_makes_of_its_source_range(result: quarkconv.ConversionResult) -> None:
    manifest = read_manifest(result.output)
    assert manifest is not None
    assert isinstance(result.source, Path)
    files = {source.name: (result.source / source.name).read_bytes() for source in manifest.sources}
    for shard in manifest.shards:
        data = (result.output / shard.file).read_bytes()
        position = shard.header
        for tensor in shard.tensors:
            for piece, _ in tensor.pieces:
                _, file, start, nbytes = piece.source
                expected = bytearray(files[file][start : start + nbytes])
                if isinstance(piece, Rows):
                    if piece.widen:
                        assert piece.widen == "BF16"
                        wide = torch.frombuffer(expected, dtype=torch.bfloat16).float()
                        expected = bytearray(wide.numpy().tobytes())
                    expected *= piece.repeat
                else:
                    assert isinstance(piece, Copy)
                assert data[position : position + len(expected)] == expected, tensor.name
                position += len(expected)


def test_a_checkpoint_without_one_has_none(checkpoints: Checkpoints) -> None:
    assert read_manifest(checkpoints("mixtral-quark0.11-eager")) is None


Value = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    model = make_checkpoint(folder / "model", scale_dtype=torch.bfloat16)
    return quarkconv.convert_checkpoint(model, "fused-int8", folder / "out").output


def pieces(value: Value, kind: str) -> list[list[Any]]:
    """The pieces of a kind, each with its checksum."""
    tensors = [tensor for shard in value["shards"] for tensor in shard["tensors"]]
    return [pair for tensor in tensors for pair in tensor["pieces"] if pair[0][0] == kind]


def copy(value: Value) -> list[Any]:
    row: list[Any] = pieces(value, "copy")[0][0]
    return row


def rows(value: Value) -> list[Any]:
    row: list[Any] = pieces(value, "rows")[0][0]
    return row


def weights(value: Value, scale: list[Any]) -> None:
    """Make weights of the first copy, with a scale."""
    row = copy(value)
    row[:] = ["weights", *row[1:], scale]


def columns(value: Value, run: int, stride: int) -> list[Any]:
    return ["columns", *copy(value)[1:], run, stride]


DAMAGES: dict[str, Callable[[Value], object]] = {
    "another version": lambda value: value.update(format="quarkconv.plan.manifest/2"),
    "no version": lambda value: value.pop("format"),
    "another checksum": lambda value: value.update(checksum="crc32"),
    "no shards": lambda value: value.pop("shards"),
    "shards null": lambda value: value.update(shards=None),
    "files a number": lambda value: value.update(files=3),
    "a file of two fields": lambda value: value["files"][0].pop(),
    "a shard without tensors": lambda value: value["shards"][0].pop("tensors"),
    "a shard that is a list": lambda value: value.update(shards=[[]]),
    "a negative size": lambda value: value["shards"][0].update(size=-1),
    "a size that is true": lambda value: value["shards"][0].update(size=True),
    "a size in text": lambda value: value["shards"][0].update(size="10"),
    "a fraction of a byte": lambda value: value["files"][0].__setitem__(1, 1.5),
    "a header without checksum": lambda value: value["shards"][0].update(header=[4096]),
    "a name that is a number": lambda value: value["shards"][0]["tensors"][0].update(name=1),
    "a shape with text": lambda value: value["shards"][0]["tensors"][0].update(shape=["3"]),
    "a negative shape": lambda value: value["shards"][0]["tensors"][0].update(shape=[-3]),
    "an unknown kind of piece": lambda value: copy(value).__setitem__(0, "move"),
    "a source tensor that is a number": lambda value: copy(value).__setitem__(1, 7),
    "a source that is not there": lambda value: copy(value).__setitem__(2, 99),
    "a negative source": lambda value: copy(value).__setitem__(2, -1),
    "a negative start": lambda value: copy(value).__setitem__(3, -1),
    "a piece without length": lambda value: copy(value).pop(),
    "a piece with a value too many": lambda value: copy(value).append(1),
    "a piece that is an object": lambda value: pieces(value, "copy")[0].__setitem__(0, {}),
    "a copy as rows": lambda value: rows(value).__setitem__(slice(5, 7), ["", 1]),
    "an unknown computation": lambda value: rows(value).__setitem__(5, "F64"),
    "a negative repeat": lambda value: rows(value).__setitem__(6, -1),
    "rows without repeat": lambda value: rows(value).pop(),
    "weights without a scale": lambda value: copy(value).__setitem__(0, "weights"),
    "weights of weights": lambda value: weights(value, ["weights", *copy(value)[1:], list(copy(value))]),
    "weights with half a scale": lambda value: weights(value, [*copy(value)[:4], 6]),
    "weights of rows that do not fit": lambda value: weights(value, [*copy(value)[:4], 4 * 7]),
    "columns without width": lambda value: copy(value).__setitem__(slice(None), columns(value, 0, 8)),
    "columns that overlap": lambda value: copy(value).__setitem__(slice(None), columns(value, 9, 8)),
    "columns of a broken row": lambda value: copy(value).__setitem__(slice(None), columns(value, 3, 8)),
    "columns beyond the range": lambda value: copy(value).__setitem__(slice(None), columns(value, 2**40, 2**41)),
    "a piece without checksum": lambda value: pieces(value, "copy")[0].pop(),
    "a checksum that is null": lambda value: pieces(value, "copy")[0].__setitem__(1, None),
    "no experts": lambda value: value["moe"].pop("experts"),
    "experts in text": lambda value: value["moe"].update(experts="3"),
    "layers null": lambda value: value["moe"].update(layers=None),
    "prefixes of numbers": lambda value: value["moe"].update(prefixes=[1]),
    "moe a list": lambda value: value.update(moe=[]),
    "scheme null": lambda value: value.update(scheme=None),
}
PATHS = ("../model.safetensors", "/etc/passwd", "a/../../b", "a/./b", "", ".", "..", "a//b", "a\\b", "sub/")


def damaged(written: Path, folder: Path, change: Callable[[Value], object]) -> Path:
    value = json.loads((written / "quarkconv.json").read_text())
    before = json.dumps(value)
    change(value)
    assert json.dumps(value) != before
    (folder / "quarkconv.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_malformed_is_refused(written: Path, tmp_path: Path, damage: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_manifest(damaged(written, tmp_path, DAMAGES[damage]))
    assert caught.value.code == "manifest-invalid"
    assert caught.value.file == str(tmp_path / "quarkconv.json")
    assert caught.value.hint


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["shard", "file", "source"])
def test_a_path_out_of_the_directory_is_refused(written: Path, tmp_path: Path, kind: str, path: str) -> None:
    def change(value: Value) -> None:
        if kind == "shard":
            value["shards"][0]["file"] = path
        else:
            value["files" if kind == "file" else "sources"][0][0] = path

    with pytest.raises(SourceError, match="malformed"):
        read_manifest(damaged(written, tmp_path, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\x00", '{"format": NaN'])
def test_anything_but_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "quarkconv.json").write_text(text)
    with pytest.raises(SourceError) as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "manifest-invalid"


def test_what_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quarkconv.json").write_bytes(b'{"format": "\xff"}')
    with pytest.raises(SourceError):
        read_manifest(tmp_path)


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="needs a locale with names in UTF-8")
def test_a_name_in_any_script_survives(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    (model / "größe 層.txt").write_text("x")
    result = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out")
    assert read_manifest(result.output) == result.manifest
    assert "größe 層.txt" in set(result.manifest.file_names())
