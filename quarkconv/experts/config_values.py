"""Values of a config.json, read strictly: of the right type and in range, or a reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkconv.experts.family import Keys, Setting
from quarkconv.experts.function import Unknown

Config = Mapping[str, Any]


def first(config: Config, keys: Keys) -> tuple[Any, str]:
    """The value of the first key that exists, and the key; (None, the first key) without one."""
    found = next((key for key in keys if config.get(key) is not None), None)
    return (None, keys[0] if keys else "") if found is None else (config[found], found)


def of_layer(value: object, layer: int | None) -> object:
    """The entry of a layer, of a setting that is a list with one for each."""
    if not isinstance(value, list):
        return value
    if layer is None:
        return value[0] if value and all(item == value[0] for item in value) else value
    return value[layer] if layer < len(value) else value


def factor(config: Config, keys: Keys, default: float | None) -> float | Unknown:
    """A positive number; `default` where config.json does not say, None: it must."""
    value, key = first(config, keys)
    if value is None and default is not None:
        return default
    return found if (found := positive_float(value)) is not None else not_known(key, value)


def parameter(config: Config, keys: Keys, default: float | None) -> float | Unknown | None:
    """A positive number of an activation; if the family has one."""
    return factor(config, keys, default) if keys else None


def number(value: float | Unknown | None) -> float:
    """A value that is known to be a number."""
    assert isinstance(value, int | float)  # what is unknown was returned before
    return float(value)


def not_known(key: str, value: object) -> Unknown:
    """The reason for a setting that is missing, or has a value that no row has."""
    if value is None:
        return Unknown(f"config.json has no {key}", key, missing=True)
    return Unknown(f"config.json has {key} = {short(value)}, an unknown value", key)


def short(value: object) -> str:
    """A value as Python writes it, cut off at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_one_of(value: object, allowed: tuple[Setting, ...]) -> bool:
    """Whether a value is one of these."""
    # By type too: JSON's 1 is not true, though Python finds them equal.
    return any(type(value) is type(setting) and value == setting for setting in allowed)


def positive_int(value: object) -> int | None:
    """The value where it is a positive integer."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def positive_float(value: object) -> float | None:
    """The value where it is a positive number that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 1e-30 < value < 1e30 else None
