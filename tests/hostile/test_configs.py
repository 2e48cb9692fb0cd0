"""Configs that lie: of the wrong types at every place, too large, too deep, with patterns that never end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hostile import corrupted, judge
from support.model import Model
from support.program import run_cli
from support.quark_config import layer_config, quark_config

from quarkconv import SourceError, inspect_checkpoint
from quarkconv.scheme.formats.readers import declared_scheme
from quarkconv.scheme.patterns import TimeLimit, name_filter

pytestmark = pytest.mark.long(15)


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes the config.json of a checkpoint."""

    def corrupt(folder: Path) -> None:
        value = json.loads((folder / "config.json").read_text())
        change(value)
        (folder / "config.json").write_text(json.dumps(value))

    return corrupt


def text(content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / "config.json").write_bytes(data)


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


INVALID = {
    "a list": text("[]"),
    "empty": text(""),
    "not JSON": text("{model_type: qwen3_moe}"),
    "not UTF-8": text(b'{"model_type":"\xff"}'),
    "a gigabyte": lambda folder: os.truncate(folder / "config.json", 2**30),
    "nested 100,000 deep": text('{"a":' * 100_000),
    "nested 500 deep": config(lambda value: value.update(a=nested(500))),
    "a quantization_config nested 200 deep": config(lambda value: value.update(quantization_config=nested(200))),
    "seven million values": text('{"a":[' + "0," * 7_000_000 + "0]}"),
    "an integer of 5,000 digits": text('{"num_experts":' + "9" * 5000 + "}"),
    "a directory": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_config_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge(corrupted(tmp_path / "model", INVALID[name]), capsys)
    assert verdict.inspect == 1
    assert verdict.codes[:1] == ["config-invalid"]
    assert (verdict.convert, verdict.error["code"], verdict.error["file"]) == (
        3,
        "config-invalid",
        str(tmp_path / "model/config.json"),
    )


VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**100, float("inf"), float("nan"), "", "x", "*", "re:(", "\ud800", "x" * 100_000,
    [], [None], [[]], nested(90), {}, {"": {}}, {"*": None}, {"a": [1, {"b": {}}]},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


CONFIGS = {
    "quark": quark_config(
        exclude=["lm_head", "re:.*gate$"], layer_quant_config={"*self_attn*": layer_config()},
        layer_type_quant_config={"Linear": layer_config()},
    ),
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }},
    },
    "w8a8_int8": {"quant_method": "w8a8_int8", "ignore": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("method", CONFIGS)
def test_any_value_anywhere_in_a_quantization_config_is_handled(method: str) -> None:
    """Either a scheme is read, and every problem is a short text, or one error says what is wrong."""
    tried = 0
    for path in places(CONFIGS[method]):
        for value in VALUES:
            whole = {"quantization_config": json.loads(json.dumps(CONFIGS[method]))}
            parent: Any = whole
            for key in ("quantization_config", *path)[:-1]:
                parent = parent[key]
            parent[("quantization_config", *path)[-1]] = value
            scheme = declared_scheme(whole["quantization_config"])
            tried += 1
            if scheme is None:
                continue
            for module in ("lm_head", "model.layers.0.self_attn.q_proj", ""):
                scheme.resolve(module)
                scheme.resolve_expert(module, f"{module}.0.gate_proj")
            assert all(len(problem.found) < 200 and len(problem.field) < 300 for problem in scheme.problems)
            assert len(repr(scheme.default)) < 1000
    assert tried > 50


WRONG = {
    "a string": "int8",
    "a list": [quark_config()],
    "no method": {**quark_config(), "quant_method": None},
    "a method nested 90 deep": {**quark_config(), "quant_method": nested(90)},
    "a method of a megabyte": {**quark_config(), "quant_method": "x" * 2**20},
    "exclude a string": {**quark_config(), "exclude": "lm_head"},
    "a dtype of a megabyte": quark_config(global_quant_config=layer_config({"dtype": "x" * 2**20, "is_dynamic": 0})),
    "10,000 layers that are numbers": quark_config(layer_quant_config={f"m{i}": i for i in range(10_000)}),
    "a layer of a megabyte": quark_config(layer_quant_config={"x" * 2**20: 1}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_in_a_quantization_config_are_handled(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrupted(tmp_path / "model", config(lambda value: value.update(quantization_config=WRONG[name])))
    code, stdout, stderr = run_cli(capsys, "inspect", folder)
    assert (code, stderr) == (1, "")
    assert len(stdout) < 200_000
    value = json.loads(run_cli(capsys, "inspect", folder, "--json")[1])
    assert {"quant-config-invalid", "scheme-unsupported"} & {item["code"] for item in value["findings"]}
    assert all(len(item["message"]) + len(item["subject"]) < 2000 for item in value["findings"])
    assert len(value["findings"]) < 250


@pytest.mark.parametrize(
    "text",
    ["\ud800", "\ud800 and \udfff", "\x1b[31m", "größe 層"],
    ids=["half a pair", "two halves", "escape", "letters"],
)
def test_strings_of_the_config_survive_a_conversion(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corrupted(tmp_path / "model", config(lambda value: value.update(note=text, limit=[0.0, float("inf")])))
    assert run_cli(capsys, "convert", folder, "--to", "fused-int8", "--out", tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (written["note"], written["limit"]) == (text, [0.0, float("inf")])


MODULE = "model.layers.0.mlp.experts.0.gate_proj"
LONG = "model.layers.0." + "a" * 900
EXPLOSIVE = {
    "(a+)+$": r"re:.*(a+)+$",
    "(a|a)*$": r"re:model\.layers\.0\.(a|a)*$",
    "(a|aa)+$": r"re:model\.layers\.0\.(a|aa)+$",
    "(x+x+)+y": r"re:.*(a+a+)+y",
    "many stars": "re:" + ".*a" * 30 + "b",
    "many lazy stars": "re:" + ".*?a" * 30 + "b",
    "backreferences": r"re:.*(a*)*\1\1\1b",
    "lookaheads": "re:" + "(?=.*a)" * 20 + ".*" * 20 + "b",
    "nested repeats": "re:((((a{1,100}){1,100}){1,100}){1,100}){1,100}b",
    "a class of everything, 400 times": "re:(?i)" + "[\\x00-\\U0010ffff]" * 400,
    "nested 5,000 deep": "re:" + "(" * 5000 + "a" + ")*" * 5000,
    "10,000 choices": "re:" + "|".join(f"a{i}b" for i in range(6000)),
    "a glob of many stars": "*a" * 400 + "*b",
    "a glob of many questions": "?*" * 400 + "b",
    "a glob of classes": "[!b]*" * 400 + "c",
    "a glob of repeated text": "*" + ("a" * 60 + "b*") * 50,
}


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the processor time: what backtracks forever takes all of it, whatever it is."""
    monkeypatch.setattr("quarkconv.scheme.patterns._SECONDS", 0.2)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("name", EXPLOSIVE)
def test_a_pattern_that_backtracks_forever_is_cut_off(name: str) -> None:
    """It is matched, or refused with one error that names the patterns, within a limit of processor time."""
    names = [f"{LONG}{number}" for number in range(200)] + [MODULE]
    scheme = declared_scheme(quark_config(exclude=[EXPLOSIVE[name]]))
    assert scheme is not None
    error = matched(scheme.resolve, names)
    assert error is None or (error.code, error.message) == (
        "quant-config-invalid",
        "The patterns of the quantization config take too long to match",
    )


def matched(resolve: Callable[[str], object], names: list[str]) -> SourceError | None:
    """Why not all names could be matched, if so."""
    try:
        for name in names:
            resolve(name)
    except SourceError as error:
        return error
    return None


NEVER = r"re:(\w|[a-z.]|..)*[!?]"


@pytest.mark.usefixtures("short_limit")
def test_a_pattern_that_backtracks_forever_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    model.quantization["exclude"] = [NEVER]
    folder = model.write(tmp_path / "model")
    verdict = judge(folder, capsys)
    assert (verdict.inspect, verdict.codes) == (3, ["quant-config-invalid"])
    assert (verdict.convert, verdict.error["code"], verdict.error["file"]) == (3, "quant-config-invalid", "config.json")


@pytest.mark.parametrize(
    "entries",
    [[f"re:a{i}" for i in range(2001)], [f"a*{i}*b" for i in range(2001)], ["re:" + "a" * 50_001], ["?" * 50_001]],
    ids=["re", "glob", "long re", "long glob"],
)
def test_too_many_patterns_are_refused(entries: list[str]) -> None:
    with pytest.raises(SourceError, match="too many patterns"):
        name_filter(entries, globs=True, limit=TimeLimit())
    with pytest.raises(SourceError, match="too many patterns"):
        declared_scheme(quark_config(exclude=entries))


def test_patterns_that_are_slow_together_are_refused() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.gate_proj" for i in range(60) for j in range(256)]
    matches = name_filter([f"*a*{i}*b" for i in range(2000)], globs=True, limit=TimeLimit())
    error = matched(matches, names)
    assert error is not None
    assert "take too long" in error.message


def test_fnmatch_patterns_match_as_fnmatch_does() -> None:
    from fnmatch import fnmatchcase

    names = ["a", "ab", "ba", "aba", "", "b", "a*b", "a.b", "[a]", "lm_head", "model.lm_head", "a\nb"]
    for pattern in (
        "*",
        "**",
        "a*",
        "*a",
        "*a*",
        "**a**",
        "a*b",
        "?",
        "a?b",
        "[ab]",
        "[!a]*",
        "*[",
        "[*",
        "*.b",
        "",
        "a",
    ):
        matches = name_filter([pattern], globs=True, limit=TimeLimit())
        for name in names:
            assert bool(matches(name)) == fnmatchcase(name, pattern), (pattern, name)


def test_a_refused_pattern_does_not_affect_the_next_inspection(tmp_path: Path) -> None:
    model = Model()
    model.quantization["exclude"] = [NEVER]
    with pytest.raises(SourceError):
        inspect_checkpoint(model.write(tmp_path / "one"))
    assert inspect_checkpoint(Model().write(tmp_path / "two")).ok


COUNTS = ("num_experts", "num_experts_per_tok", "num_hidden_layers", "hidden_size", "moe_intermediate_size")


@pytest.mark.parametrize("value", [2**63, 10**25, -(10**25), float("inf"), float("nan"), [10**25], {"a": 1}, "8", None])
@pytest.mark.parametrize("key", COUNTS)
def test_a_count_of_any_size_and_type_is_handled(key: str, value: object, tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model")
    config(lambda raw: raw.update({key: value}))(folder)
    codes = {item.code for item in inspect_checkpoint(folder).findings}
    assert ("expert-count" in codes) == (key == "num_experts" and type(value) is int and value > 0)
