"""``quarkconv verify`` on the command line: its options, exit codes, JSON, and completion of layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.commands import Run
from support.exports import Converted

import quarkconv
from quarkconv.cli.options import parse_layer_numbers, parse_layers
from quarkconv.cli.verify import _complete_layers, parse_tokens

NAME = "qwen3_moe-quark0.13-f2f"
TALKER = "talker.model.layers.0.mlp"


@pytest.mark.parametrize(
    ("text", "layers"), [("0,3-5", [0, 3, 4, 5]), (" 7 - 8 , 1", [7, 8, 1]), (f"{TALKER},2", [TALKER, 2])]
)
def test_lists_of_layers_are_read(text: str, layers: list[int | str]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["5-2", "", "1,,2", "-1", "1-", "9999999999", "a b", "3x"])
def test_invalid_lists_of_layers_are_refused(text: str) -> None:
    with pytest.raises(quarkconv.UsageError, match="Invalid --layers"):
        parse_layers(text)


@pytest.mark.parametrize("text", [f"0,{TALKER}", "1-"])
def test_layer_numbers_have_no_modules(text: str) -> None:
    assert parse_layer_numbers("3,0-1,1") == {0, 1, 3}
    with pytest.raises(quarkconv.UsageError, match="Invalid --layers") as caught:
        parse_layer_numbers(text)
    assert caught.value.expected == "numbers and ranges such as 0,3-5"


@pytest.mark.parametrize(("text", "tokens"), [("64", [64]), (" 16 ,1024", [16, 1024])])
def test_lists_of_tokens_are_read(text: str, tokens: list[int]) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "1,", "-1", "1e3", "9999999999"])
def test_invalid_lists_of_tokens_are_refused(text: str) -> None:
    with pytest.raises(quarkconv.UsageError, match="Invalid --tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bytes-only", "--numbers-only"],
        ["--layers", "5-2"],
        ["--tokens", "0"],
        ["--device", "tpu"],
        ["--layers", "99"],
    ],
)
def test_wrong_usage_gives_2(arguments: list[str], converted: Converted, command: Run) -> None:
    result = command("verify", converted(NAME), *arguments)
    assert (result.code, result.out) == (2, ""), result.err
    assert result.err.startswith("error: ")


def test_a_sound_checkpoint_gives_0(converted: Converted, command: Run) -> None:
    result = command("verify", converted(NAME), "--device", "cpu", "--layers", "0", "--tokens", "2,4", "--json")
    assert result.code == 0, result.err
    value = result.json
    assert (value["schema"], value["ok"], value["problems"]) == ("quarkconv.verify/1", True, [])
    assert [(layer["layer"], layer["tokens"]) for layer in value["numbers"]["layers"]] == [(0, 2), (0, 4)]
    assert value["bytes"]["pieces"] > 0


@pytest.mark.parametrize(
    ("options", "skipped"),
    [(["--bytes-only"], "numbers"), (["--numbers-only", "--layers", "0", "--tokens", "2"], "bytes")],
)
def test_a_stage_that_is_left_out_is_not_checked(
    options: list[str], skipped: str, converted: Converted, command: Run
) -> None:
    arguments = ["verify", converted(NAME), "--device", "cpu", *options]
    assert command(*arguments, "--json").json[skipped]["skipped"]
    assert "not checked" in command(*arguments).out


def test_a_damaged_checkpoint_gives_1_and_names_the_tensor(tmp_path: Path, command: Run) -> None:
    model = make_checkpoint(tmp_path / "model")
    out = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out").output
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = command("verify", out, "--bytes-only", "--json")
    assert result.code == 1
    (problem,) = result.json["problems"]
    assert problem["stage"] == "bytes"
    assert problem["tensor"] in command("verify", out, "--bytes-only").out


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("", ["0-2", "0", "1", "2"]),
        ("1", ["1"]),
        ("0,", ["0,0", "0,1", "0,2"]),
        ("0-", ["0-0", "0-1", "0-2"]),
        ("x", []),
    ],
)
def test_layers_are_completed_from_the_model(typed: str, completed: list[str], converted: Converted) -> None:
    context: Any = SimpleNamespace(params={"model": str(converted(NAME))})
    assert _complete_layers(context, typed) == completed


def test_without_a_model_nothing_is_completed(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(params={"model": str(tmp_path / "missing")})
    assert _complete_layers(context, "") == []
