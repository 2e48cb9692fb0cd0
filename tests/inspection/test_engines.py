"""The table of engines: well-formed, and right about the exports that were tried."""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.model import Model
from support.program import run_cli

import quarkconv
from quarkconv import inspect_checkpoint
from quarkconv.experts import families
from quarkconv.inspection import engines
from quarkconv.inspection.advice import Advice, advice
from quarkconv.inspection.engine_facts import (
    FEATURES,
    EngineFact,
    checked_in_one_release,
    checked_model_types,
    engine_facts,
)
from quarkconv.inspection.engines import stored_form
from quarkconv.scheme.spec import SCHEME_NAMES

TABLE = Path(quarkconv.__file__).parent / "inspection" / "engines.toml"
ROWS: list[dict[str, Any]] = tomllib.loads(TABLE.read_text("utf-8"))["rows"]
FAMILIES = Path(__file__).parents[1] / "data" / "families"
FORMS = {"quark", "compressed-tensors", "fused-int8", "w8a8-int8", "ascend", "bf16"}


def fact(**conditions: Any) -> EngineFact:
    return EngineFact("vllm", ">=1", "quark", "int8", "", "source", "2026-11-01", **conditions)


def verdicts(path: Path, form: str, engine: str = "vllm", devices: str = "") -> dict[str, str]:
    """Version -> verdict, on NVIDIA GPUs or on the devices whose description starts like that."""
    return {
        row.version: row.verdict
        for row in inspect_checkpoint(path).engines
        if (row.engine, row.form) == (engine, form)
        and (row.devices.startswith(devices) if devices else not row.devices)
    }


def test_every_row_is_read() -> None:
    assert len(engine_facts()) == len(ROWS) > 10


def test_the_json_that_is_read_holds_the_table() -> None:
    copied = json.loads(TABLE.with_suffix(".json").read_text("utf-8"))
    table = tomllib.loads(TABLE.read_text("utf-8"))
    assert copied == json.loads(json.dumps(table, default=str)), "run `make docs`"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['engine']} {row['version']} {row['as']}")
def test_a_row_is_well_formed(row: dict[str, Any]) -> None:
    assert row["engine"] in {"vllm", "vllm-ascend", "sglang", "transformers", "quark", "ktransformers"}
    assert row["as"] in FORMS
    assert row["verdict"] in {"int8", "w8a16", "wrong", "fails"}
    assert row["version"]
    assert row["evidence"]
    assert "checked" not in row or type(row["checked"]) is datetime.date
    assert row["note"] or row["verdict"] == "int8"
    assert set(row.get("schemes", [])) <= {*SCHEME_NAMES.values(), "mixed"}
    assert set(row.get("layouts", [])) <= {"per_expert", "stacked", "fused"}
    assert {*row.get("having", []), *row.get("not_having", [])} <= set(FEATURES)
    for key in ("schemes", "layouts", "model_types", "not_model_types", "having", "not_having"):
        assert key not in row or (row[key] and all(isinstance(item, str) for item in row[key]))
    if "int8_in_float" in row:
        assert re.fullmatch(r"[\d.]+", row["version"])  # rows of several releases are replaced where they include it
        assert row["int8_in_float"] in {"model", "mtp"}
        assert row["engine"] in {rule.engine for family in families.FAMILIES for rule in family.float_in_one_engine}


def test_no_row_is_repeated() -> None:
    keys = [
        (row["engine"], row["version"], row["as"],
         *(str(row.get(key)) for key in ("devices", "schemes", "layouts", "model_types", "having", "int8_in_float")))
        for row in ROWS
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("change", [{"verdict": "fine"}, {"schems": ["mixed"]}, {"int8_in_float": "head"}])
def test_a_malformed_row_is_refused(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "quarkconv.inspection.engine_facts._table", lambda: {"rows": [{**ROWS[0], **change}], "checked_model_types": {}}
    )
    with pytest.raises(ValueError, match="malformed"):
        engine_facts.__wrapped__()


@pytest.mark.parametrize(
    ("row", "arguments", "holds"),
    [
        (fact(), ("ptpc_int8", "fused", "mixtral"), True),
        (fact(), ("mixed", None, None), True),
        (fact(schemes=("ptpc_int8",)), ("ptpc_int8", None, None), True),
        (fact(schemes=("ptpc_int8",)), ("int8_static", None, None), False),
        (fact(layouts=("stacked", "fused")), ("ptpc_int8", "fused", None), True),
        (fact(layouts=("stacked", "fused")), ("ptpc_int8", "per_expert", None), False),
        (fact(layouts=("stacked",)), ("ptpc_int8", None, None), False),
        (fact(model_types=("mixtral",)), ("ptpc_int8", None, "mixtral"), True),
        (fact(model_types=("mixtral",)), ("ptpc_int8", None, "step3p5"), False),
        (fact(not_model_types=("mixtral",)), ("ptpc_int8", None, "mixtral"), False),
        (fact(not_model_types=("mixtral",)), ("ptpc_int8", None, None), True),
        (fact(schemes=("mixed",), model_types=("mixtral",)), ("mixed", None, "step3p5"), False),
    ],
)
def test_a_row_holds_for_its_schemes_layouts_and_model_types(
    row: EngineFact, arguments: tuple[str, str | None, str | None], holds: bool
) -> None:
    assert row.holds_for(*arguments) is holds


def test_what_was_only_read_is_not_checked_on_any_device() -> None:
    on_others = [row for row in engine_facts() if row.devices]
    tried = {row.evidence for row in on_others if row.verdict in {"int8", "w8a16"}}
    assert tried
    assert all("served" in evidence or "loader" in evidence for evidence in tried)
    read = [row for row in on_others if row.verdict == "not checked"]
    assert {row.engine for row in read} == {"vllm", "vllm-ascend", "sglang", "ktransformers"}
    assert all(row.note.startswith(("int8 as read, not run", "w8a16 as read, not run")) for row in read)


@pytest.mark.parametrize("name", ["deepseek_v32-0.13-f2f", "qwen4_exp-0.13-f2f"])
def test_a_family_that_ran_on_gpus_is_not_checked_elsewhere(name: str) -> None:
    engines_found = inspect_checkpoint(FAMILIES / name).engines
    assert any(row.verdict == "int8" and not row.devices for row in engines_found)
    assert {row.verdict for row in engines_found if row.devices} <= {"not checked", "fails"}


def test_a_row_has_the_json_of_the_contract() -> None:
    assert fact().to_json() == {"engine": "vllm", "version": ">=1", "as": "quark", "verdict": "int8", "note": ""}


# Against engines that were run


def test_the_rows_of_qwen3_moe_have_these_verdicts(checkpoints: Any) -> None:
    path = checkpoints("qwen3_moe-quark0.13-f2f")
    assert verdicts(path, "quark") == {
        "<0.20": "fails", "0.25.1": "int8", "0.27.0": "w8a16", "0.28 - 0.33": "int8",
    }  # fmt: skip
    assert verdicts(path, "fused-int8") == {"0.25.1": "fails", ">=0.28": "int8"}
    assert verdicts(path, "quark", "sglang") == {"0.5.23": "fails"}
    assert verdicts(path, "fused-int8", "transformers") == {"5.23 - 5.24": "wrong"}


@pytest.mark.parametrize("name", ["mixtral-quark0.11-eager", "minimax_m2-quark0.13-f2f"])
def test_models_of_the_other_naming_load_fused(name: str, checkpoints: Any) -> None:
    assert verdicts(checkpoints(name), "fused-int8")[">=0.28"] == "int8"


@pytest.mark.parametrize(
    ("name", "verdict"), [("deepseek_v3-quark0.13-f2f", "fails"), ("step3p5-like-3key_fused", "wrong")]
)
def test_models_whose_class_takes_no_fused_experts(name: str, verdict: str, checkpoints: Any) -> None:
    found = verdicts(checkpoints(name), "fused-int8")
    assert found["0.28 - 0.33"] == verdict
    assert "int8" not in found.values()


def test_static_activations_fail_fused_and_the_engine_is_named(checkpoints: Any) -> None:
    inspection = inspect_checkpoint(checkpoints("qwen3_moe-quark0.11-eager-int8_static"))
    assert inspection.targets["fused-int8"].supported
    rows = [row for row in inspection.engines if row.form == "fused-int8" and row.engine == "vllm"]
    assert {row.verdict for row in rows} == {"fails"}
    assert any("need dynamic activation scales" in row.note for row in rows)


def test_static_activations_are_advised_to_run_with_our_plugin(checkpoints: Any) -> None:
    inspection = inspect_checkpoint(checkpoints("qwen3_moe-quark0.11-eager-int8_static"))
    assert [(item.text, item.target) for item in inspection.advice] == [
        (
            "vLLM 0.26 - 0.33 runs it in int8 as it is, with QUARKCONV_VLLM=1 and quarkconv installed beside vLLM; "
            "0.27.0 keeps activations in 16 bits",
            None,
        )
    ]


def test_the_plugin_is_not_checked_with_static_activations_of_other_model_types() -> None:
    rows = [row for row in engine_facts() if "QUARKCONV_VLLM=1" in row.devices]
    assert [row.verdict for row in rows] == ["not checked"]
    assert rows[0].holds_for("int8_static", "per_expert", "mixtral")
    assert not rows[0].holds_for("int8_static", "per_expert", "qwen3_moe")


def test_no_row_for_static_activations_advises_a_conversion_that_fails() -> None:
    rows = [row for row in engine_facts() if "int8_static" in row.schemes and row.verdict == "fails"]
    assert rows
    assert not [row.note for row in rows if "to compressed-tensors" in row.note or "to fused-int8" in row.note]


def test_three_keys_are_loaded_wrongly_by_old_engines(checkpoints: Any) -> None:
    assert verdicts(checkpoints("step3p5-like-3key_fused"), "quark")["0.20 - 0.21"] == "wrong"
    assert "0.20 - 0.21" not in verdicts(checkpoints("mixtral-quark0.11-eager"), "quark")


def test_a_scale_for_each_tensor_loses_accuracy(checkpoints: Any) -> None:
    rows = inspect_checkpoint(checkpoints("qwen3_moe-quark0.13-f2f-per_tensor_weight")).engines
    assert any(row.form == "quark" and "loses accuracy" in row.note for row in rows)


@pytest.mark.parametrize(
    "name", ["qwen3_moe-bf16", "mixtral-quark0.13-eager-experts_left_bf16", "qwen3-0.13-f2f-dense"]
)
def test_advice_needs_int8_experts(name: str, checkpoints: Any) -> None:
    assert inspect_checkpoint(checkpoints(name)).engines == ()


def test_the_best_verdict_comes_first(checkpoints: Any) -> None:
    found = [row.verdict for row in inspect_checkpoint(checkpoints("step3p5-like-3key_fused")).engines]
    assert found == sorted(found, key=["int8", "w8a16", "not checked", "wrong", "fails"].index)
    assert len(set(found)) > 2


@pytest.mark.parametrize(
    ("name", "form"),
    [("qwen3_moe-quark0.13-f2f", "quark"), ("step3p5-like-3key_fused", "quark"), ("qwen3_moe-bf16", None)],
)
def test_the_form_that_a_checkpoint_is_in(name: str, form: str | None, checkpoints: Any) -> None:
    assert stored_form(inspect_checkpoint(checkpoints(name)).description) == form


@pytest.mark.parametrize(
    ("name", "form", "engine", "verdict"),
    [
        ("qwen3_moe-0.13-f2f-layer_excluded", "w8a8-int8", "sglang", {"0.5.23": "fails"}),
        ("qwen3_moe-quark0.13-f2f", "w8a8-int8", "sglang", {"0.5.23": "int8"}),
        ("qwen3_moe-0.11-eager-layer_type", "compressed-tensors", "vllm", {"0.28 - 0.33": "int8"}),
        ("qwen3_moe-quark0.13-f2f", "quark", "quark", {"0.13": "fails"}),
        ("mixtral-quark0.11-eager", "quark", "quark", {}),  # it has zero points
    ],
)
def test_what_else_a_checkpoint_has_counts(
    name: str, form: str, engine: str, verdict: dict[str, str], checkpoints: Any
) -> None:
    found = verdicts(checkpoints(name), form, engine)
    assert {version: found[version] for version in found if version in verdict or engine != "vllm"} == verdict


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("qwen3_moe-0.11-eager-layer_type", "fails"), ("qwen3_moe-0.13-f2f-exclude_patterns_on_disk", "wrong")],
)
def test_what_vllm_reads_otherwise_in_a_quark_config(name: str, verdict: str, checkpoints: Any) -> None:
    found = verdicts(checkpoints(name), "quark")
    assert found["0.33"] == verdict
    assert "0.28 - 0.33" not in found
    rows = inspect_checkpoint(checkpoints(name)).engines
    assert any((row.engine, row.form, row.verdict) == ("vllm", "compressed-tensors", "int8") for row in rows)


@pytest.mark.parametrize("form", ["w8a8-int8", "compressed-tensors"])
def test_shared_experts_in_float_need_an_option_of_sglang(form: str, checkpoints: Any) -> None:
    def found(name: str) -> list[tuple[str, bool]]:
        rows = inspect_checkpoint(checkpoints(name)).engines
        option = "--disable-shared-experts-fusion"
        return [
            (row.verdict, option in row.note)
            for row in rows
            if (row.engine, row.form, row.devices) == ("sglang", form, "")
        ]

    assert found("glm4_moe-0.13-f2f-experts_only") == [("int8", True), ("wrong", True)]
    assert found("deepseek_v3-quark0.13-f2f") == [("int8", False)]


def test_advice_names_the_options_that_an_engine_needs() -> None:
    row = fact()._replace(note="with --an-option; not on ROCm")
    assert advice("quark", [row]) == (Advice("vLLM >=1 runs it in int8 as it is, with --an-option"),)
    [found] = advice("fused-int8", [row])
    assert found.text == "vLLM >=1 runs it in int8 after convert --to quark, with --an-option"


def test_cpus_run_what_is_packed_for_them_and_routed_by_softmax(checkpoints: Any) -> None:
    softmax, sigmoid = checkpoints("qwen3_moe-quark0.13-f2f"), checkpoints("minimax_m2-quark0.13-f2f")
    assert verdicts(softmax, "quark", devices="CPUs with AMX") == {"0.32": "fails", "0.33": "fails"}
    assert verdicts(softmax, "compressed-tensors", devices="CPUs with AMX") == {"0.32": "int8"}
    assert verdicts(sigmoid, "compressed-tensors", devices="CPUs with AMX") == {}
    assert verdicts(sigmoid, "compressed-tensors", devices="CPUs")["0.32"] == "fails"


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        ("deepseek_v32-0.13-f2f", "compressed-tensors", {"0.33": "int8", "0.20 - 0.27": "not checked"}),
        ("deepseek_v32-0.13-f2f", "fused-int8", {"0.33": "fails", "0.25.1": "fails"}),
        ("qwen4_exp-0.13-f2f", "fused-int8", {"0.33": "int8", "0.25.1": "fails"}),
        ("mimo_v2_flash-0.13-f2f", "fused-int8", {"0.33": "wrong", "0.25.1": "fails"}),
        ("gpt_oss-0.13-eager", "compressed-tensors", {"0.33": "fails", "0.20 - 0.27": "not checked"}),
        ("glm4_moe-0.13-f2f", "compressed-tensors", {"0.28 - 0.33": "int8", "0.20 - 0.27": "w8a16"}),
    ],
)
def test_a_family_runs_in_the_releases_that_it_was_run_with(name: str, form: str, expected: dict[str, str]) -> None:
    assert verdicts(FAMILIES / name, form) == expected


@pytest.mark.parametrize(
    ("versions", "release", "covered"),
    [
        ("0.28 - 0.33", "0.33", True), ("0.28 - 0.32", "0.33", False), (">=0.28", "0.33", True),
        (">=0.34", "0.33", False), ("0.33", "0.33", True), ("0.32", "0.33", False),
        ("<0.20", "0.33", False), ("<0.40", "0.33", True),
    ],
)  # fmt: skip
def test_a_range_covers_a_release(versions: str, release: str, covered: bool) -> None:
    assert engines._covers(versions, release) is covered


def test_a_release_that_model_types_were_run_with_is_one_of_a_row() -> None:
    for engine, (release, model_types) in checked_in_one_release().items():
        assert model_types <= checked_model_types()[engine]
        assert any(engines._covers(row.version, release) for row in engine_facts() if row.engine == engine)


def test_routers_that_a_class_names_otherwise_are_wrong() -> None:
    families = Path(__file__).parents[1] / "data" / "families"
    assert verdicts(families / "phimoe-0.13-f2f", "quark")["0.33"] == "wrong"
    assert "0.33" not in verdicts(families / "phimoe-0.13-eager", "quark")
    assert verdicts(families / "phimoe-0.13-eager", "quark")["0.28 - 0.33"] == "not checked"


# Advice


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3_moe-quark0.13-f2f",
            [
                "vLLM 0.28 - 0.33 runs it in int8 as it is; 0.27.0 keeps activations in 16 bits",
                "SGLang 0.5.23 runs it in int8 after convert --to w8a8-int8",
            ],
        ),
        (
            "step3p5-like-3key_fused",
            ["as it is; 0.27.0 keeps activations in 16 bits, 0.20 - 0.21 computes wrong results"],
        ),
        (
            "qwen3_moe-quark0.13-f2f-per_tensor_weight",
            [
                "vLLM >=0.28 runs it in int8 after convert --to fused-int8; as it is, 0.33 and 0.27.0 keep activations "
                "in 16 bits, 0.29 - 0.32 and 0.28 compute wrong results"
            ],
        ),
    ],
)
def test_advice_names_what_runs(
    name: str, expected: list[str], checkpoints: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [item.text for item in inspect_checkpoint(checkpoints(name)).advice]
    for words in expected:
        assert any(words in line for line in lines)
    _, output, _ = run_cli(capsys, "inspect", checkpoints(name))
    for line in lines:
        assert line in " ".join(output.split())


def test_advice_after_conversion_names_what_runs(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    fused = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "fused").output
    assert [item.text for item in inspect_checkpoint(fused).advice] == [
        "vLLM >=0.28 runs it in int8 as it is",
        "SGLang 0.5.23 runs it in int8 after convert --to w8a8-int8",
        "transformers 5.23 - 5.24 computes wrong results",
    ]
    bf16 = quarkconv.convert_checkpoint(root, "bf16", tmp_path / "bf16").output
    assert inspect_checkpoint(bf16).advice == ()


@pytest.mark.parametrize(
    ("form", "verdict", "expected"),
    [
        ("quark", "fails", ()),
        ("fused-int8", "fails", ()),
        ("fused-int8", "w8a16", ()),
        ("quark", "wrong", (Advice("other 3 computes wrong results"),)),
        ("quark", "int8", (Advice("other 3 runs it in int8 as it is"),)),
        ("fused-int8", "int8", (Advice("other 3 runs it in int8 after convert --to fused-int8", "fused-int8"),)),
    ],
)
def test_advice_follows_from_one_row(form: str, verdict: str, expected: tuple[Advice, ...]) -> None:
    fact = EngineFact("other", "3", form, verdict, "", "source")
    assert advice("quark", [fact]) == expected
    assert advice("quark", [fact._replace(devices="CPUs")]) == ()
    assert advice("quark", []) == ()


def test_engines_are_not_checked_with_an_untested_model_type(tmp_path: Path) -> None:
    model = Model()
    model.config["model_type"] = "brand_new_moe"
    folder = model.write(tmp_path)
    inspection = inspect_checkpoint(folder)
    on_gpus = {row.verdict for row in inspection.engines if row.engine in {"vllm", "sglang"}}
    assert on_gpus == {"not checked", "fails"}
    assert not [item for item in inspection.advice if "in int8" in item.text]
    assert inspection.not_checked[-1].startswith("the function of the experts (")
    deep = inspect_checkpoint(folder, deep=True)
    assert deep.ok
    assert "Sound" not in deep.headline


def test_what_engines_do_with_a_contradiction_is_unknown(tmp_path: Path) -> None:
    """The config excludes a linear that is int8: an engine may believe either."""
    model = Model()
    model.quantization["exclude"] = ["model.layers.0.self_attn.o_proj"]
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert not inspection.ok
    assert {row.form for row in inspection.engines} == {
        "compressed-tensors",
        "fused-int8",
        "w8a8-int8",
        "ascend",
        "bf16",
    }


# For people


def test_a_screen_shows_the_latest_release_that_runs_it_and_all_shows_the_rest(
    checkpoints: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoints("qwen3_moe-quark0.13-f2f")
    (_, short, _), (_, whole, _) = run_cli(capsys, "inspect", path), run_cli(capsys, "inspect", path, "--all")
    assert "0.25.1" in whole
    assert "0.25.1" not in short
    assert "transformers" in whole
    assert "transformers" not in short
    assert "more rows with --all" in short
    assert "more row" not in whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gpt_oss-0.13-eager",
            {
                "vLLM 0.33 fails as it is and after convert --to compressed-tensors; "
                "other releases were not checked with this model type",
                "SGLang 0.5.23 computes wrong results after convert --to w8a8-int8 and after convert --to "
                "compressed-tensors",
            },
        ),
        (
            "aria-0.13-eager",
            {
                "vLLM 0.33 computes wrong results after convert --to compressed-tensors, 0.33 fails after convert --to "
                "fused-int8; other releases were not checked with this model type",
                "SGLang was not checked with this model type",
            },
        ),
    ],
)
def test_advice_agrees_with_the_rows_about_the_model_type(name: str, expected: set[str]) -> None:
    assert {item.text for item in inspect_checkpoint(FAMILIES / name).advice} == expected


def test_the_line_of_engines_agrees_with_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    for name, answer in (
        ("gpt_oss", "none is known to run it in int8"),
        ("phimoe", "Engines  not checked with phimoe"),
    ):
        assert answer in run_cli(capsys, "inspect", FAMILIES / f"{name}-0.13-eager")[1]
