"""From tensors to modules: what belongs together, and what form it has."""

from __future__ import annotations

import pytest

from quarkconv.dtypes import TensorType
from quarkconv.experts.naming import FUSED_LEAVES
from quarkconv.scheme.form import Form, fused_names, linear_names
from quarkconv.scheme.stored import StoredModules, stored_modules

Types = dict[str, tuple[str, tuple[int, ...]]]


def stored(types: Types) -> StoredModules:
    shared = {found: TensorType(*found) for found in types.values()}  # headers share equal types, too
    return stored_modules({name: shared[found] for name, found in types.items()}, FUSED_LEAVES)


@pytest.mark.parametrize(
    ("weight", "scale", "granularity"),
    [
        ((6, 4), (6,), "per_channel"),
        ((6, 4), (6, 1), "per_channel"),
        ((6, 4), (), "per_tensor"),
        ((6, 4), (1,), "per_tensor"),
        ((6, 4), (1, 1), "per_tensor"),
        ((6, 4), (4,), None),
        ((6, 4), (1, 4), None),
        ((6, 4), (6, 4), None),
        ((6, 4), (0,), None),
        ((6, 4), (6, 1, 1), None),
        ((1, 4), (1,), "per_channel"),
        ((3, 6, 4), (3, 6), "per_channel"),
        ((3, 6, 4), (3, 6, 1), "per_channel"),
        ((3, 6, 4), (3,), "per_tensor"),
        ((3, 6, 4), (3, 1), "per_tensor"),
        ((3, 6, 4), (3, 1, 1), "per_tensor"),
        ((3, 6, 4), (6,), None),
        ((3, 6, 4), (), None),
        ((3, 6, 4), (1,), None),
        ((6,), (6,), None),
    ],
)
def test_the_shape_of_a_scale_decides_the_granularity(
    weight: tuple[int, ...], scale: tuple[int, ...], granularity: str | None
) -> None:
    assert Form(TensorType("I8", weight), TensorType("F32", scale)).granularity == granularity


def test_without_a_scale_there_is_no_granularity() -> None:
    assert Form(TensorType("I8", (6, 4))).granularity is None


@pytest.mark.parametrize(
    ("dtype", "quantized", "is_float"),
    [("I8", True, False), ("BF16", False, True), ("F16", False, True), ("F32", False, True), ("F64", False, True),
     ("U8", False, False), ("I32", False, False), ("F8_E4M3", False, False)],
)  # fmt: skip
def test_dtypes_are_quantized_or_float(dtype: str, quantized: bool, is_float: bool) -> None:
    form = Form(TensorType(dtype, (2, 2)))
    assert (form.quantized, form.is_float) == (quantized, is_float)


def test_the_tensors_of_a_linear_are_gathered() -> None:
    types: Types = {
        "a.input_zero_point": TensorType("I8", ()),
        "a.weight_scale": TensorType("F32", (6,)),
        "a.weight": TensorType("I8", (6, 4)),
        "a.weight_zero_point": TensorType("I8", (6,)),
        "a.weight_offset": TensorType("F32", (6, 1)),
        "a.input_scale": TensorType("F32", ()),
        "a.bias": TensorType("BF16", (6,)),
    }
    modules = stored(types)
    assert modules.linears == {
        "a": Form(
            TensorType("I8", (6, 4)),
            TensorType("F32", (6,)),
            TensorType("I8", (6,)),
            TensorType("F32", ()),
            TensorType("I8", ()),
            TensorType("F32", (6, 1)),
        ),
    }
    assert modules.unrecognised == ()
    assert set(linear_names("a")) == set(types) - {"a.bias"}


def test_fused_experts_are_gathered() -> None:
    types: Types = {
        "mlp.experts.gate_up_proj": TensorType("I8", (3, 8, 4)),
        "mlp.experts.gate_up_proj_scale": TensorType("F32", (3, 8, 1)),
        "mlp.experts.gate_up_proj_input_scale": TensorType("F32", (3,)),
        "mlp.experts.w2": TensorType("BF16", (3, 4, 4)),
    }
    modules = stored(types)
    assert modules.linears == {}
    assert modules.fused == {
        "mlp.experts.gate_up_proj": Form(
            TensorType("I8", (3, 8, 4)), TensorType("F32", (3, 8, 1)), None, TensorType("F32", (3,))
        ),
        "mlp.experts.w2": Form(TensorType("BF16", (3, 4, 4))),
    }
    assert modules.unrecognised == ()
    assert fused_names("e.w13")[:2] == ("e.w13", "e.w13_scale")


def test_equal_forms_are_one_object() -> None:
    modules = stored(
        {f"{name}.weight{part}": kind for name in "ab" for part, kind in
         (("", TensorType("I8", (6, 4))), ("_scale", TensorType("F32", (6,))))}
    )  # fmt: skip
    assert modules.linears["a"] is modules.linears["b"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.norm.weight", TensorType("BF16", (8,))),
        ("model.norm.bias", TensorType("BF16", (8,))),
        ("mlp.gate.e_score_correction_bias", TensorType("F32", (8,))),
        ("mlp.experts.gate_up_proj_bias", TensorType("BF16", (3, 8))),
        ("attention.sinks", TensorType("BF16", (8, 1, 1))),
    ],
)
def test_other_tensors_are_not_modules(name: str, kind: tuple[str, tuple[int, ...]]) -> None:
    modules = stored({name: kind})
    assert list(modules) == []
    assert modules.unrecognised == ()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.weight_scale", TensorType("F32", (6,))),
        ("a.weight_zero_point", TensorType("I8", (6,))),
        ("a.input_scale", TensorType("F32", ())),
        ("a.qweight", TensorType("I8", (6, 4))),
        ("mlp.experts.gate_up_proj_scale", TensorType("F32", (3, 8, 1))),
    ],
)
def test_codes_and_scales_without_a_module_are_unrecognised(name: str, kind: tuple[str, tuple[int, ...]]) -> None:
    beside: Types = {"b.weight": TensorType("I8", (6, 4)), "b.weight_scale": TensorType("F32", (6,))}
    assert stored({**beside, name: kind}).unrecognised == (name,)


def test_an_orphan_is_found_when_the_numbers_add_up() -> None:
    """One scale too many and one missing: as many scales as int8 modules."""
    types: Types = {"a.weight": TensorType("I8", (6, 4)), "b.weight_scale": TensorType("F32", (6,))}
    assert stored(types).linears["a"].scale is None
    assert stored(types).unrecognised == ("b.weight_scale",)


def test_scales_of_a_key_value_cache_belong_to_their_projection() -> None:
    types: Types = {
        "k_proj.weight": TensorType("I8", (6, 4)),
        "k_proj.weight_scale": TensorType("F32", (6,)),
        "k_proj.output_scale": TensorType("BF16", ()),
    }
    assert stored(types).unrecognised == ()


def test_each_module_is_quantized_float_or_neither() -> None:
    modules = stored(
        {
            "a.weight": TensorType("I8", (2, 2)),
            "b.weight": TensorType("I8", (2, 2)),
            "c.weight": TensorType("BF16", (2, 2)),
            "d.weight": TensorType("U8", (2, 2)),
        }
    )
    assert {name for name, form in modules if form.quantized} == {"a", "b"}
    assert {name for name, form in modules if form.is_float} == {"c"}
