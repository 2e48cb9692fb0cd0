"""The scheme of each module by a Quark config, against what Quark's own loader answers."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.quark_config import INPUT, STATIC_INPUT, TENSOR_WEIGHT, WEIGHT, layer_config, quark_config

from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.formats.quark import QuarkScheme
from quarkconv.scheme.formats.readers import declared_scheme
from quarkconv.scheme.spec import (
    FLOAT,
    INPUT_PER_TOKEN,
    SCHEME_NAMES,
    WEIGHT_PER_CHANNEL,
    ModuleScheme,
    TensorSpec,
)

DATA = Path(__file__).parents[2] / "data" / "quark_matching"
CASES = json.loads(lzma.decompress((DATA / "cases.json.xz").read_bytes()))
PTPC = ModuleScheme(WEIGHT_PER_CHANNEL, INPUT_PER_TOKEN)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def named(dtype: str) -> dict[str, Any]:
    """A layer config that the dtype of its weight identifies."""
    return layer_config({**WEIGHT, "dtype": dtype})


def chosen(scheme: ModuleScheme) -> str:
    return scheme.weight.dtype if scheme.weight else "excluded"


def scheme_of(group: dict[str, Any]) -> QuarkScheme:
    return QuarkScheme(
        quark_config(
            exclude=group["exclude"],
            global_quant_config=named("global"),
            layer_quant_config={key: named(f"layer:{key}") for key in group["layers"]},
            layer_type_quant_config={key: named(f"type:{key}") for key in group["types"]},
            kv_cache_quant_config={key: named(f"kv:{key}") for key in group["kv"]},
        )
    )


def loader_outcomes(group: dict[str, Any]) -> dict[str, str]:
    """What Quark's loader answers for each linear; a checkpoint does not say that a weight is of another class."""
    return {
        name: outcome if isinstance(outcome, str) else outcome["loader"]
        for name, kind, outcome in group["cases"]
        if kind == "Linear"
    }


def expression_excludes(group: dict[str, Any], name: str) -> bool:
    for entry in group["exclude"]:
        if entry.startswith("re:"):
            try:
                if re.match(entry[3:], name):
                    return True
            except re.error:
                continue
    return False


@pytest.mark.parametrize("group", CASES["groups"], ids=lambda group: group["note"])
def test_each_module_gets_the_scheme_of_quarks_loader(group: dict[str, Any]) -> None:
    scheme = scheme_of(group)
    for name, outcome in loader_outcomes(group).items():
        # Two deliberate differences: `re:` entries are read as engines read them, and Quark ignores them; an excluded
        # module whose output is quantized, for the KV cache, has a float weight.
        expected = "excluded" if outcome == "output-only" or expression_excludes(group, name) else outcome
        assert chosen(scheme.resolve(name)) == expected, name


def test_the_differences_are_these() -> None:
    differences = {
        (tuple(group["exclude"]), name)
        for group in CASES["groups"]
        for name, outcome in loader_outcomes(group).items()
        if outcome not in ("output-only", chosen(scheme_of(group).resolve(name)))
    }
    assert {excludes for excludes, _ in differences} == {
        ("re:.*lm_head",),
        ("re:.*self_attn.*",),
        ("re:model\\.layers\\.0\\..*",),
        ("re:lm_head",),
        ("re:.*",),
        ("re:.*self_attn.*", "re:*lm_head"),
    }
    assert sum(len(loader_outcomes(group)) for group in CASES["groups"]) > 900


# Precedence


def test_exclude_wins_over_an_exact_key() -> None:
    scheme = QuarkScheme(quark_config(exclude=["*q_proj"], layer_quant_config={Q_PROJ: named("key")}))
    assert scheme.resolve(Q_PROJ) == FLOAT


def test_the_first_key_wins_even_over_an_exact_one() -> None:
    first = QuarkScheme(quark_config(layer_quant_config={"*": named("glob"), Q_PROJ: named("exact")}))
    last = QuarkScheme(quark_config(layer_quant_config={Q_PROJ: named("exact"), "*": named("glob")}))
    assert chosen(first.resolve(Q_PROJ)) == "glob"
    assert chosen(last.resolve(Q_PROJ)) == "exact"


def test_a_key_wins_over_the_type_and_the_type_over_global() -> None:
    scheme = QuarkScheme(
        quark_config(
            global_quant_config=named("global"),
            layer_type_quant_config={"Conv2d": named("conv"), "Linear": named("type")},
            layer_quant_config={"*q_proj": named("key")},
        )
    )
    assert chosen(scheme.resolve(Q_PROJ)) == "key"
    assert chosen(scheme.resolve("lm_head")) == "type"
    assert chosen(scheme.default) == "type"


def test_levels_are_not_merged() -> None:
    """A key without a weight means a float weight, not the global one."""
    scheme = QuarkScheme(quark_config(layer_quant_config={"*q_proj": layer_config(None, INPUT)}))
    assert scheme.resolve(Q_PROJ) == ModuleScheme(None, INPUT_PER_TOKEN)
    assert scheme.resolve("lm_head") == PTPC


def test_all_null_is_float() -> None:
    scheme = QuarkScheme(quark_config(layer_quant_config={"*q_proj": layer_config(None, None)}))
    assert scheme.resolve(Q_PROJ) == FLOAT


@pytest.mark.parametrize(
    ("pattern", "name", "excluded"),
    [
        ("re:.*gate$", "model.layers.0.mlp.gate", True),
        ("re:.*gate$", "model.layers.0.mlp.gate_proj", False),
        ("re:layers", "model.layers.0.mlp.gate", False),  # from the start of the name
        ("re:model", "model.layers.0.mlp.gate", True),
        ("re:(", "model.layers.0.mlp.gate", False),
        ("re:[[a-z]odel", "model.layers.0.mlp.gate", True),  # of which Python warns
        ("model.layers.0", "model.layers.0.mlp.gate", False),
        ("*.GATE", "model.layers.0.mlp.gate", False),
        ("model.blocks[[]0].fc", "model.blocks[0].fc", True),
        ("model.blocks[0.fc", "model.blocks[0.fc", True),
    ],
)
def test_exclude_patterns_match_as_in_quark(pattern: str, name: str, excluded: bool) -> None:
    assert (QuarkScheme(quark_config(exclude=[pattern])).resolve(name) == FLOAT) is excluded


# Specs


@pytest.mark.parametrize(
    ("weight", "inputs", "name"),
    [
        (WEIGHT, INPUT, "ptpc_int8"),
        ({**WEIGHT, "ch_axis": -2}, {**INPUT, "ch_axis": -1}, "ptpc_int8"),
        (TENSOR_WEIGHT, INPUT, "int8_per_tensor_weight"),
        (TENSOR_WEIGHT, STATIC_INPUT, "int8_static"),
        ([WEIGHT], [INPUT], "ptpc_int8"),
        (WEIGHT, STATIC_INPUT, None),
        (WEIGHT, None, None),
        (None, INPUT, None),
        ({**WEIGHT, "symmetric": False}, INPUT, None),
        ({**WEIGHT, "symmetric": None}, INPUT, None),
        ({**WEIGHT, "dtype": "uint8"}, INPUT, None),
        ({**WEIGHT, "dtype": "int4"}, INPUT, None),
        ({**WEIGHT, "ch_axis": 1}, INPUT, None),
        ({**WEIGHT, "qscheme": "per_group", "group_size": 128}, INPUT, None),
        ({**WEIGHT, "is_dynamic": True}, INPUT, None),
        (WEIGHT, {**INPUT, "dtype": "fp8_e4m3"}, None),
        (WEIGHT, {**INPUT, "symmetric": False}, None),
        (WEIGHT, {**TENSOR_WEIGHT, "is_dynamic": True}, None),
        ([WEIGHT, {**WEIGHT, "dtype": "int4"}], INPUT, None),
    ],
)
def test_each_pair_of_settings_has_the_name_of_its_scheme(weight: Any, inputs: Any, name: str | None) -> None:
    scheme = QuarkScheme(quark_config(global_quant_config=layer_config(weight, inputs)))
    assert SCHEME_NAMES.get(scheme.resolve(Q_PROJ)) == name
    assert scheme.problems == []


def test_names_of_fields_before_quark_1_are_read() -> None:
    old = {"dtype": "int8", "qscheme": "per_channel", "axis": 0, "dynamic": False, "symmetric": True}
    scheme = QuarkScheme(
        quark_config(global_quant_config=layer_config(old, {**old, "axis": 1, "dynamic": True}), exclude=None)
    )
    assert scheme.default == PTPC


def test_two_stages_are_shown_with_both_dtypes() -> None:
    weight = [{**WEIGHT, "dtype": "fp8_e4m3"}, {**WEIGHT, "dtype": "int4"}]
    scheme = QuarkScheme(quark_config(global_quant_config=layer_config(weight)))
    assert scheme.default.weight == TensorSpec("fp8_e4m3+int4", "multi_stage", symmetric=False, dynamic=False)


def test_only_a_dynamic_input_is_per_token() -> None:
    scheme = QuarkScheme(quark_config(global_quant_config=layer_config(WEIGHT, {**INPUT, "is_dynamic": False})))
    assert scheme.default.activation == TensorSpec("int8", "per_channel(axis=1)", symmetric=True, dynamic=False)


def test_version_and_format_are_read() -> None:
    scheme = QuarkScheme(quark_config(version="0.11.1+abc", export={"weight_format": "fake_quantized"}))
    assert (scheme.method, scheme.version, scheme.stores_codes) == ("quark", "0.11.1+abc", False)
    bare = QuarkScheme({"quant_method": "quark"})
    assert (bare.version, bare.stores_codes, bare.default, bare.problems) == (None, True, FLOAT, [])


# Whatever a config holds, it is read without an exception


def resolve_all(scheme: DeclaredScheme | None) -> None:
    assert scheme is not None
    for module in (Q_PROJ, "lm_head", ""):
        scheme.resolve(module)
        scheme.resolve_expert("model.layers.0.mlp.experts", module)


PATHS = (
    ("global_quant_config",),
    ("global_quant_config", "weight"),
    ("global_quant_config", "input_tensors"),
    ("global_quant_config", "weight", "dtype"),
    ("global_quant_config", "weight", "qscheme"),
    ("global_quant_config", "weight", "is_dynamic"),
    ("global_quant_config", "weight", "ch_axis"),
    ("global_quant_config", "weight", "symmetric"),
    ("layer_quant_config",),
    ("layer_quant_config", "*q_proj"),
    ("layer_quant_config", "*q_proj", "weight"),
    ("layer_type_quant_config",),
    ("layer_type_quant_config", "Linear"),
    ("exclude",),
    ("export",),
    ("export", "weight_format"),
    ("version",),
    ("quant_method",),
)
JUNK: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    "x",
    "re:(",
    [],
    ["x"],
    [1, None, "lm_head"],
    [[]],
    [{}],
    [{}, {}],
    {},
    {"x": []},
    [{"dtype": []}],
)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_junk_at_every_place_is_a_problem_of_the_config(path: tuple[str, ...]) -> None:
    for junk in JUNK:
        config = quark_config(
            layer_quant_config={"*q_proj": layer_config()}, layer_type_quant_config={"Linear": layer_config()}
        )
        parent = config
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = junk
        resolve_all(declared_scheme(config))


@pytest.mark.parametrize("junk", [True, 1, "quark", [], [quark_config()]], ids=str)
def test_a_quantization_config_that_is_not_an_object(junk: object) -> None:
    scheme = declared_scheme(junk)
    resolve_all(scheme)
    assert scheme is not None
    assert [problem.field for problem in scheme.problems] == ["quantization_config"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"exclude": "lm_head"}, "exclude"),
        ({"exclude": ["lm_head", 1]}, "exclude"),
        ({"layer_quant_config": []}, "layer_quant_config"),
        ({"layer_quant_config": {"*": 1}}, "layer_quant_config.*"),
        ({"global_quant_config": "int8"}, "global_quant_config"),
        ({"global_quant_config": layer_config(weight={"qscheme": "per_channel"})}, "global_quant_config.weight"),
        ({"export": "x"}, "export"),
        ({"quant_method": 1}, "quant_method"),
        ({"quant_method": None}, "quant_method"),
    ],
)
def test_what_is_ignored_is_named(changes: dict[str, Any], field: str) -> None:
    scheme = declared_scheme(quark_config(**changes))
    assert scheme is not None
    assert [problem.field for problem in scheme.problems] == [field]


def test_the_good_entries_of_a_bad_list_count() -> None:
    assert QuarkScheme(quark_config(exclude=[1, "lm_head", None])).resolve("lm_head") == FLOAT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(150))
@given(
    method=st.sampled_from(["quark", "compressed-tensors", "w8a8_int8", "gptq"]),
    fields=st.dictionaries(
        st.sampled_from([
            "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "export", "version",
            "config_groups", "ignore",
        ]),
        json_values,
    ),
)  # fmt: skip
def test_any_json_is_read(method: str, fields: dict[str, Any]) -> None:
    resolve_all(declared_scheme({"quant_method": method, **fields}))
