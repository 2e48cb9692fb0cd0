"""The results of ``verify --part``, merged into that of the whole verification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from quarkconv.errors import UsageError
from quarkconv.findings import finding_from_json
from quarkconv.text import word
from quarkconv.verify.layer_results import Distance, LayerExperts, LayerNumbers, LinearError, WeightError
from quarkconv.verify.results import (
    SCHEMA,
    BytesResult,
    LinearsResult,
    NumbersResult,
    Problem,
    StructureResult,
    UncheckedLayer,
    Verification,
)

_WORST: Final = 10
_LABELS: Final = {
    "quarkconv": "version of quarkconv",
    "plan": "plan of the conversion",
    "tensors": "tensors of the checkpoint",
    "layers": "layers",
    "tokens": "--tokens",
    "seed": "--seed",
    "stages": "stages",
    "compared": "what it is compared with",
}


def merged(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON object of the whole verification.

    Args:
        results: name -> the object that ``verify --part K/N --json`` printed, for each part; names are for messages.

    Raises:
        UsageError: one is not such an object, parts are missing or occur twice, or belong to different verifications.
    """
    parts: dict[int, tuple[str, dict[str, Any]]] = {}
    first, expected = next(iter(results.items()), ("", {}))
    for name, value in results.items():
        part = value.get("part")
        if value.get("schema") != SCHEMA or not isinstance(part, dict) or not isinstance(part.get("identity"), dict):
            raise _invalid(name, "not a part of a verification")
        number = part.get("number")
        if not isinstance(number, int):
            raise _invalid(name, f"a part with the number {word(number)}")
        for key in ("count", *_LABELS):
            here, there = _shared(value, key), _shared(expected, key)
            if here != there:
                label = _LABELS.get(key, "number of parts")
                raise UsageError(
                    "The parts belong to different verifications",
                    file=name,
                    expected=f"{label} {word(there)}, as in {first}",
                    found=word(here),
                    hint="verify each part with the same options",
                )
        if number in parts:
            raise UsageError("A part appears twice", file=name, expected="each part once", found=f"part {number}")
        parts[number] = (name, value)
    count = _shared(expected, "count")
    missing = [number for number in range(1, count + 1) if number not in parts] if isinstance(count, int) else []
    if missing or not parts:
        raise UsageError(
            "Parts of the verification are missing",
            expected=f"{count or 'at least one'} parts",
            found=str(len(parts)),
            hint="run " + ", ".join(f"--part {number}/{count}" for number in missing[:5]) if missing else None,
        )
    try:
        return _merge([parts[number][1] for number in sorted(parts)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(first, repr(error)[:100]) from error


def verification_from_json(value: dict[str, Any]) -> Verification:
    """A verification from its JSON object, for reports. Errors of weights have four digits there.

    Raises:
        UsageError: it is not such an object.
    """
    try:
        numbers = value["numbers"]
        return Verification(
            model=value["model"],
            source=value["source"],
            unquantized=value["unquantized"],
            scheme=value["scheme"],
            structure=StructureResult(**value["structure"]),
            bytes=BytesResult(**value["bytes"]),
            numbers=NumbersResult(
                device=numbers["device"],
                backend=numbers["backend"],
                tokens=tuple(numbers["tokens"]),
                seed=numbers["seed"],
                layers=tuple(map(_layer, numbers["layers"])),
                experts=tuple(map(_experts, numbers["experts"])),
                skipped=numbers["skipped"],
                not_checked=tuple(UncheckedLayer(**layer) for layer in numbers["not_checked"]),
                linears=_linears(numbers["linears"]),
            ),
            problems=tuple(Problem(**item) for item in value["problems"]),
            findings=tuple(map(finding_from_json, value["findings"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _invalid("", repr(error)[:100]) from error


def _shared(value: dict[str, Any], key: str) -> Any:
    part = value.get("part", {})
    return part.get("count") if key == "count" else part["identity"].get(key)


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    first = parts[0]
    order = {prefix: number for number, prefix in enumerate(first["part"]["identity"]["layers"])}
    numbers = [part["numbers"] for part in parts]
    tokens = numbers[0]["tokens"]
    layers = [layer for item in numbers for layer in item["layers"]]
    experts = [layer for item in numbers for layer in item["experts"]]
    roles = [role for layer in experts[:1] for role in layer["weights"]]

    def rank(row: dict[str, Any]) -> tuple[float, int, int, int]:
        error = row["relative_error"]
        return -math.inf if error is None else -error, order[row["module"]], roles.index(row["role"]), row["expert"]

    worst = sorted((row for item in numbers for row in item["worst"]), key=rank)
    problems = [problem for part in parts for problem in part["problems"]]
    structure = [problem for problem in problems if problem["stage"] == "structure"]
    checked = [part["bytes"] for part in parts]
    complete = all(part["ok"] for part in parts) and all(item["skipped"] is None for item in numbers)
    if complete and len(layers) != len(order) * len(tokens):
        raise ValueError(f"numbers of {len(layers)} layers, expected {len(order) * len(tokens)}")
    return {
        **{key: first[key] for key in first if key != "part"},
        "ok": all(part["ok"] for part in parts),
        "bytes": {
            **checked[0],
            "pieces": sum(item["pieces"] for item in checked),
            "nbytes": sum(item["nbytes"] for item in checked),
            "skipped": _skipped(checked),
        },
        "numbers": {
            **numbers[0],
            "device": " and ".join(dict.fromkeys(item["device"] for item in numbers)),
            "backend": " and ".join(dict.fromkeys(item["backend"] for item in numbers)),
            "layers": sorted(layers, key=lambda layer: (order[layer["module"]], tokens.index(layer["tokens"]))),
            "experts": sorted(experts, key=lambda layer: order[layer["module"]]),
            "worst": worst[:_WORST],
            "skipped": _skipped(numbers),
            "linears": next((item["linears"] for item in numbers if item["linears"] is not None), None),
        },
        "problems": [
            *_unique(structure),
            *_by_layer([problem for problem in problems if problem["stage"] == "bytes"]),
            *_by_layer([problem for problem in problems if problem["stage"] not in ("structure", "bytes")]),
        ],
        "findings": _unique([item for part in parts for item in part["findings"]]),
    }


def _skipped(results: list[dict[str, Any]]) -> str | None:
    """Why a stage was not checked, in all parts or in one of them."""
    return next((item["skipped"] for item in results if item["skipped"] is not None), None)


def _by_layer(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(problems, key=lambda problem: (problem["layer"] is None, problem["layer"] or 0))


def _unique(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for number, item in enumerate(items) if item not in items[:number]]


def _layer(value: dict[str, Any]) -> LayerNumbers:
    distances = {name: _distance(value[name]) for name in ("exact", "dequantized", "outliers", "unquantized")}
    return LayerNumbers(**{key: item for key, item in value.items() if key != "ok"} | distances)


def _distance(value: dict[str, Any] | None) -> Distance | None:
    if value is None:
        return None
    return Distance(**{key: math.nan if item is None and key != "snr_db" else item for key, item in value.items()})


def _experts(value: dict[str, Any]) -> LayerExperts:
    def error(relative: float | None, clipped: float | None) -> WeightError:
        known = math.inf if relative is None else relative  # JSON has null for both infinity and NaN
        snr = -20 * math.log10(known) if 0 < known < math.inf else None
        return WeightError(known, snr, math.nan if clipped is None else clipped)

    return LayerExperts(
        layer=value["layer"],
        module=value["module"],
        load=tuple(value["load"]),
        scale_min=tuple(map(_number, value["scale_min"])),
        scale_max=tuple(map(_number, value["scale_max"])),
        scale_histogram=tuple(value["scale_histogram"]),
        weights={
            role: tuple(map(error, columns["relative_error"], columns["clipped"]))
            for role, columns in value["weights"].items()
        },
        rescaled=value["rescaled"],
    )


def _linears(value: dict[str, Any] | None) -> LinearsResult | None:
    if value is None:
        return None
    errors = ((item["module"], item["relative_error"]) for item in value["worst"])
    return LinearsResult(
        compared=value["compared"],
        rescaled=value["rescaled"],
        worst=tuple(LinearError(module, math.inf if error is None else error) for module, error in errors),
        not_compared=tuple(UncheckedLayer(**item) for item in value["not_compared"]),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _invalid(name: str, found: str) -> UsageError:
    return UsageError(
        "The file is not the result of a part",
        file=name or None,
        expected="what `quarkconv verify --part K/N --json` prints",
        found=found,
    )
