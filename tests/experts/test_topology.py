"""Which layers have routed experts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from quarkconv.dtypes import TensorType
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.naming import FUSED_LEAVES
from quarkconv.experts.topology import Topology, expert_topology
from quarkconv.scheme.stored import stored_modules

Types = dict[str, tuple[str, tuple[int, ...]]]
GATED = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")
PREFIX = "model.layers.3.mlp.experts"
H, I = 8, 6  # noqa: E741


def linear(module: str, rows: int, columns: int, dtype: str = "I8") -> Types:
    types: Types = {f"{module}.weight": (dtype, (rows, columns))}
    return types | {f"{module}.weight_scale": ("F32", (rows,))} if dtype == "I8" else types


def per_expert(
    prefix: str = PREFIX, numbers: Iterable[int | str] = range(4), names: tuple[str, ...] = GATED, dtype: str = "I8"
) -> Types:
    types: Types = {}
    for number in numbers:
        for name, (rows, columns) in zip(names, ((I, H), (I, H), (H, I)), strict=True):
            types |= linear(f"{prefix}.{number}.{name}", rows, columns, dtype)
    return types


def stacked(moe: str, names: tuple[str, ...] = GATED, experts: int = 4) -> Types:
    types: Types = {}
    for name, (rows, columns) in zip(names, ((I, H), (I, H), (H, I)), strict=True):
        types[f"{moe}.{name}.weight"] = ("I8", (experts, rows, columns))
        types[f"{moe}.{name}.weight_scale"] = ("F32", (experts, rows))
    return types


def fused(prefix: str, names: tuple[str, str], dtype: str = "I8", experts: int = 4) -> Types:
    return {
        f"{prefix}.{names[0]}": (dtype, (experts, 2 * I, H)),
        f"{prefix}.{names[0]}_scale": ("F32", (experts, 2 * I, 1)),
        f"{prefix}.{names[1]}": (dtype, (experts, H, I)),
        f"{prefix}.{names[1]}_scale": ("F32", (experts, H, 1)),
    }


def topology(types: Types, experts: int | None = None, layers: int | None = None) -> Topology:
    return expert_topology(
        stored_modules({name: TensorType(*found) for name, found in types.items()}, FUSED_LEAVES), experts, layers
    )


def only_layer(types: Types) -> MoELayer:
    found = topology(types)
    assert found.findings == ()
    assert len(found.layers) == 1
    return found.layers[0]


def codes(types: Types, experts: int | None = None) -> list[tuple[str, str, int]]:
    return [(item.code, item.subject, item.count) for item in topology(types, experts).findings]


def geometry(layer: MoELayer) -> tuple[int, int, int]:
    return layer.experts, layer.hidden, layer.intermediate


def modules_exist(layer: MoELayer, types: Types) -> bool:
    stored = stored_modules({name: TensorType(*found) for name, found in types.items()}, FUSED_LEAVES)
    return {module for _, _, module in layer.modules()} == {module for module, _ in stored}


# Layouts


@pytest.mark.parametrize("names", [GATED, NUMBERED])
def test_experts_one_by_one_make_a_layer(names: tuple[str, ...]) -> None:
    types = per_expert(names=names)
    layer = only_layer(types)
    assert (layer.index, layer.prefix, layer.moe) == (3, PREFIX, "model.layers.3.mlp")
    assert (layer.layout, layer.naming.projections()) == ("per_expert", names)
    assert geometry(layer) == (4, H, I)
    assert layer.quantized
    assert modules_exist(layer, types)
    assert [len(layer.forms[role]) for role in ("gate", "up", "down")] == [4, 4, 4]


@pytest.mark.parametrize("names", [GATED, NUMBERED])
@pytest.mark.parametrize(
    ("moe", "prefix"),
    [
        ("model.layers.3.moe", "model.layers.3.moe.experts"),
        ("model.layers.3.mlp.experts", "model.layers.3.mlp.experts"),
    ],
)
def test_stacked_experts_make_a_layer(moe: str, prefix: str, names: tuple[str, ...]) -> None:
    layer = only_layer(stacked(moe, names))
    assert (layer.layout, layer.prefix, layer.naming.projections()) == ("stacked", prefix, names)
    assert geometry(layer) == (4, H, I)
    assert [len(layer.forms[role]) for role in ("gate", "up", "down")] == [1, 1, 1]


def test_modules_of_three_keys_are_those_of_the_moe_module() -> None:
    types = stacked("model.layers.3.moe")
    assert modules_exist(only_layer(types), types)


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("w13", "w2")])
def test_fused_experts_make_a_layer(names: tuple[str, str]) -> None:
    types = fused(PREFIX, names)
    layer = only_layer(types)
    assert (layer.layout, layer.prefix, layer.index) == ("fused", PREFIX, 3)
    assert (layer.naming.fused_gate_up, layer.naming.fused_down) == names
    assert geometry(layer) == (4, H, I)
    assert (len(layer.forms["gate"]), len(layer.forms["up"]), len(layer.forms["down"])) == (1, 0, 1)
    assert modules_exist(layer, types)


@pytest.mark.parametrize(
    ("types", "up", "down"),
    [
        (per_expert(), (f"{PREFIX}.2.up_proj.weight", (0, 1)), (f"{PREFIX}.2.down_proj.weight", (0, 1))),
        (stacked("a.moe"), ("a.moe.up_proj.weight", (2, 4)), ("a.moe.down_proj.weight", (2, 4))),
        (fused(PREFIX, ("w13", "w2")), (f"{PREFIX}.w13", (5, 8)), (f"{PREFIX}.w2", (2, 4))),
    ],
    ids=["per_expert", "stacked", "fused"],
)
def test_where_the_third_expert_lies(types: Types, up: tuple[str, Any], down: tuple[str, Any]) -> None:
    layer = only_layer(types)
    for found, expected in ((layer.projection("up", 2), up), (layer.projection("down", 2), down)):
        assert (found.names.weight, found.weight) == expected
        assert found.scale == found.weight
        assert found.names.scale in types
        assert found.form.weight.shape == types[found.names.weight][1]


def test_gate_and_up_of_a_fused_tensor_share_a_scale_per_tensor() -> None:
    types = fused(PREFIX, ("w13", "w2"))
    types[f"{PREFIX}.w13_scale"] = ("F32", (4, 1, 1))
    layer = only_layer(types)
    assert [layer.projection(role, 2).weight for role in ("gate", "up")] == [(4, 8), (5, 8)]
    assert [layer.projection(role, 2).scale for role in ("gate", "up")] == [(2, 4), (2, 4)]


def test_experts_are_found_in_any_order_of_names() -> None:
    types = per_expert(numbers=range(12))
    assert only_layer(dict(sorted(types.items(), reverse=True))).experts == 12


# Modules that are not routed experts


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.shared_expert.gate_proj",
        "model.layers.3.mlp.shared_experts.gate_proj",
        "model.layers.3.mlp.shared_experts.0.gate_proj",
        "experts.0.gate_proj",
    ],
)
def test_other_linears_are_not_members(module: str) -> None:
    found = topology(linear(module, I, H))
    assert (found.layers, found.findings, found.members) == ((), (), frozenset())


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.3.mlp.experts.shared.gate_proj",
        "model.layers.3.mlp.experts.0.gate",
        "model.layers.3.mlp.experts.\N{SUPERSCRIPT TWO}.gate_proj",
        "model.layers.3.mlp.experts.\N{ARABIC-INDIC DIGIT ONE}.gate_proj",
    ],
)
def test_linears_among_the_experts_under_other_names_are_not_understood(module: str) -> None:
    found = topology(linear(module, I, H))
    assert (found.layers, found.members) == ((), frozenset())
    assert [(item.code, item.subject) for item in found.findings] == [("experts-not-understood", module)]


def test_shared_experts_and_dense_layers_stay_outside() -> None:
    types = per_expert() | linear("model.layers.3.mlp.shared_experts.down_proj", H, I)
    types |= linear("model.layers.0.mlp.down_proj", H, I)
    found = topology(types)
    assert [layer.index for layer in found.layers] == [3]
    assert len(found.members) == 12
    assert all(".mlp.experts." in member for member in found.members)


def test_members_and_others_are_all_modules() -> None:
    types = per_expert() | linear("model.layers.3.mlp.gate", 4, H) | linear(f"{PREFIX}.01.up_proj", I, H)
    types |= linear(f"{PREFIX}.0.unknown", I, H) | drop(per_expert("model.layers.4.mlp.experts"), ".3.up_proj")
    found = topology(types)
    modules = {name.removesuffix(".weight") for name in types if name.endswith(".weight")}
    experts = {name for name in modules if name.endswith("_proj") and ".01." not in name}
    assert (found.members, len(found.members)) == (experts, 23)
    assert found.others == modules.difference(found.layers[0].module_names)
    assert found.members | {"another"} == {*experts, "another"}
    assert "another" not in found.members


# Numbers of layers


@pytest.mark.parametrize(
    ("prefix", "index"),
    [
        ("model.layers.0.mlp.experts", 0),
        ("model.layers.61.mlp.experts", 61),
        ("model.language_model.layers.7.mlp.experts", 7),
        ("language_model.model.layers.7.block_sparse_moe.experts", 7),
        ("transformer.h.5.mlp.experts", 5),
        ("model.blocks.5.experts", 5),
        ("mtp.layers.0.mlp.experts", 48),
        ("mtp.layers.2.mlp.experts", 50),
        ("model.mtp.layers.1.mlp.experts", 49),
        ("model.layers.48.mtp_block.mlp.experts", 48),
    ],
)
def test_the_name_of_a_layer_has_its_number(prefix: str, index: int) -> None:
    (layer,) = topology(per_expert(prefix), layers=48).layers
    assert layer.index == index


def test_layers_are_in_order_and_mtp_comes_last() -> None:
    types = per_expert("mtp.layers.0.mlp.experts")
    for number in (10, 2, 1):
        types |= per_expert(f"model.layers.{number}.mlp.experts")
    assert [layer.index for layer in topology(types, layers=11).layers] == [1, 2, 10, 11]


def test_without_numbers_layers_count_up() -> None:
    types = per_expert("first.experts") | per_expert("second.experts")
    assert [layer.index for layer in topology(types).layers] == [0, 1]


# Missing, doubled, misshapen


def drop(types: Types, *parts: str) -> Types:
    return {name: kind for name, kind in types.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("gone", "count"),
    [
        ((".2.gate_proj",), 1),
        ((".0.gate_proj", ".3.down_proj"), 2),
        ((".1.",), 1),
        ((".0.", ".1."), 2),
        ((".up_proj",), 4),
    ],
)
def test_missing_projections_are_found(gone: tuple[str, ...], count: int) -> None:
    types = drop(per_expert(), *gone)
    assert codes(types) == [("expert-missing", PREFIX, count)]
    assert topology(types).layers == ()
    assert topology(types).members


def test_the_last_experts_missing_show_in_the_count() -> None:
    types = drop(per_expert(), "experts.3.")
    assert only_layer(types).experts == 3
    assert codes(types, experts=4) == [("expert-count", PREFIX, 1)]


def test_numbers_up_to_a_billion_cost_nothing() -> None:
    assert codes(per_expert(numbers=[0, 1, 999_999_999])) == [("expert-missing", PREFIX, 10**9 - 3)]


@pytest.mark.parametrize("number", ["00", "01", "0003", "1234567890", "9" * 30])
def test_a_number_in_another_spelling_is_not_a_second_expert(number: str) -> None:
    types = per_expert() | per_expert(numbers=[number])
    assert codes(types) == [("tensor-unrecognised", f"{PREFIX}.{number}.gate_proj", 3)]
    (layer,) = topology(types).layers
    assert layer.experts == 4


@pytest.mark.parametrize("tensor", ["gate_up_proj", "down_proj"])
def test_half_of_fused_experts_make_no_layer(tensor: str) -> None:
    types = fused(PREFIX, ("gate_up_proj", "down_proj"))
    del types[f"{PREFIX}.{tensor}"]
    assert codes(types) == [("expert-missing", PREFIX, 1)]


@pytest.mark.parametrize("name", GATED)
def test_two_of_three_keys_make_no_layer(name: str) -> None:
    types = drop(stacked("model.layers.3.moe"), f"{name}.weight")
    assert codes(types) == [("expert-missing", "model.layers.3.moe.experts", 1)]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("0.gate_proj", (I + 1, H)),
        ("1.gate_proj", (I, H + 1)),
        ("2.up_proj", (H, I)),
        ("3.down_proj", (H, I - 1)),
        ("3.down_proj", (H, I, 1, 1)),
        ("0.up_proj", (I, 0)),
    ],
)
def test_an_expert_of_another_shape_is_found(module: str, shape: tuple[int, ...]) -> None:
    types = per_expert() | {f"{PREFIX}.{module}.weight": ("I8", shape)}
    ((code, subject, count),) = codes(types)
    assert (code, count) == ("expert-shape", 1)
    assert subject.startswith(PREFIX)
    assert topology(types).layers == ()


@pytest.mark.parametrize(
    ("types", "tensor", "shape"),
    [
        (fused(PREFIX, ("gate_up_proj", "down_proj")), f"{PREFIX}.gate_up_proj", (4, 2 * I + 1, H)),
        (fused(PREFIX, ("gate_up_proj", "down_proj")), f"{PREFIX}.gate_up_proj", (4, H, 2 * I)),
        (fused(PREFIX, ("gate_up_proj", "down_proj")), f"{PREFIX}.down_proj", (3, H, I)),
        (stacked("model.layers.3.moe"), "model.layers.3.moe.up_proj.weight", (5, I, H)),
        (stacked("model.layers.3.moe"), "model.layers.3.moe.down_proj.weight", (4, I, H)),
    ],
)
def test_experts_of_another_shape_in_one_tensor_are_found(types: Types, tensor: str, shape: tuple[int, ...]) -> None:
    assert [code for code, _, _ in codes(types | {tensor: ("I8", shape)})] == ["expert-shape"]


@pytest.mark.parametrize(
    "types",
    [
        per_expert() | fused(PREFIX, ("gate_up_proj", "down_proj")),
        per_expert() | {f"{PREFIX}.gate_proj.weight": ("I8", (4, I, H))},
        per_expert() | per_expert(names=NUMBERED),
        per_expert(numbers=[0, 1]) | per_expert(numbers=[2, 3], names=NUMBERED),
        fused(PREFIX, ("gate_up_proj", "down_proj")) | fused(PREFIX, ("w13", "w2")),
        stacked("model.layers.3.mlp") | stacked("model.layers.3.mlp", NUMBERED),
    ],
    ids=[
        "one by one and fused",
        "one by one and stacked",
        "both names",
        "names by halves",
        "fused twice",
        "stacked twice",
    ],
)
def test_layouts_that_conflict_make_no_layer(types: Types) -> None:
    assert codes(types) == [("layout-conflict", PREFIX, 1)]
    assert topology(types).layers == ()


def test_a_damaged_layer_leaves_the_others() -> None:
    types = drop(per_expert(), ".3.up_proj") | per_expert("model.layers.4.mlp.experts")
    found = topology(types)
    assert [layer.index for layer in found.layers] == [4]
    assert [item.code for item in found.findings] == ["expert-missing"]
    assert len(found.members) == 23


def test_layers_of_different_size_are_found() -> None:
    types = per_expert() | per_expert("model.layers.4.mlp.experts") | per_expert("model.layers.5.mlp.experts", range(2))
    found = topology(types)
    assert [(item.code, item.subject, item.count) for item in found.findings] == [
        ("layer-geometry", "model.layers.5.mlp.experts", 1)
    ]
    assert [layer.experts for layer in found.layers] == [4, 4, 2]


# Stored otherwise


def test_packed_experts_have_fewer_columns() -> None:
    types: Types = {}
    for number in range(2):
        for name, rows, columns in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
            types[f"{PREFIX}.{number}.{name}.weight"] = ("U8", (rows, columns // 2))
    layer = only_layer(types)
    assert geometry(layer) == (2, H, I)
    assert not layer.quantized
    assert layer.float_experts() == 0


@pytest.mark.parametrize(
    ("in_float", "experts", "partly"),
    [((), 0, False), ((".1.",), 1, True), ((".1.gate_proj", ".2.down_proj"), 2, True), ((".down_proj",), 4, True),
     (("",), 4, False)],
)  # fmt: skip
def test_how_many_experts_are_in_float(in_float: tuple[str, ...], experts: int, partly: bool) -> None:
    types = {
        name: ("BF16", kind[1]) if name.endswith(".weight") and any(part in name for part in in_float) else kind
        for name, kind in per_expert().items()
    }
    layer = only_layer(types)
    assert layer.float_experts() == experts
    assert layer.partly_quantized is partly
    assert layer.quantized is (experts == 0)


@pytest.mark.parametrize("dtype", ["I8", "BF16"])
def test_fused_in_float_counts_every_expert(dtype: str) -> None:
    layer = only_layer(fused(PREFIX, ("gate_up_proj", "down_proj"), dtype))
    assert layer.float_experts() == (0 if dtype == "I8" else 4)
