"""Findings where config.json has other sizes, layers or routers than the tensors: engines build the model by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

from quarkconv.dtypes import TensorType
from quarkconv.experts.config import ModelConfig, Part
from quarkconv.experts.config_values import short
from quarkconv.experts.family import EXPERT_COUNT
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import class_of_another_type, knowledge_by_stack, layer_routing
from quarkconv.experts.known import Known
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.router_tensors import (
    fits_router,
    hidden_size,
    router_shapes,
    router_tensor_names,
)
from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.scheme.form import Form
from quarkconv.scheme.merged import MERGED_WITH
from quarkconv.scheme.resolved import Groups
from quarkconv.text import plural

_HIDDEN: Final = re.compile(r"hidden_size|^(?:d_model|n_embd|dim)$")
_INNER: Final = re.compile(r"intermediate|ffn|(?:moe|mlp|expert)\w*_dim")
"""Names of settings with the hidden size, and with the intermediate size of dense layers or of experts."""
_NUMBERS: Final = ("num_hidden_layers", "hidden_size", "moe_intermediate_size", "vocab_size", *EXPERT_COUNT)
"""Settings that are numbers in every model; engines calculate with them."""
_LAYER: Final = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks)\.)(\d{1,9})\.")
_NORMS: Final = ("input_layernorm.weight", "post_attention_layernorm.weight")
"""Ends of the names of norms of hidden states."""
_MAX_LAYERS: Final = 10_000
_HINT: Final = "use the config.json that belongs to these weights: engines build the model from it"


def disagreements(
    config: ModelConfig,
    layers: tuple[MoELayer, ...],
    types: Mapping[str, TensorType],
    vectors: tuple[str, ...],
    is_mtp: Callable[[str], bool],
) -> Iterator[Finding]:
    """The findings about the class, sizes, layers and routers.

    Args:
        config: the config of the model.
        layers: the MoE layers.
        types: all tensors.
        vectors: the names of the weights of one dimension, such as those of norms, of which every layer has some.
        is_mtp: a test of names, see :func:`quarkconv.description.mtp.mtp_test`.
    """
    name = class_of_another_type(config)
    if name is not None:
        yield finding(
            "class-mismatch",
            "config.json",
            f"config.json names {short(name)}, which is not a class of model type {short(config.raw['model_type'])}",
            hint="use the config.json that belongs to these weights: engines choose the class from architectures",
        )
    for key in _NUMBERS:
        if isinstance(value := config.text.get(key), str | bool | float):
            message = f"config.json has {key} = {value!r:.60}, which is not a whole number"
            yield finding("config-mismatch", "config.json", message, hint=_HINT)
    known_of = knowledge_by_stack(config.raw)
    of_routers = tuple(_routers(known_of, layers, types))
    parts = [(layer, part) for layer in layers if (part := config.part_of(layer.moe)) is not None]
    found: dict[str, list[str]] = {}
    for layer, part in parts:
        for message in (*_sizes(layer, part, config, known_of(layer.moe)), *_density(layer, part, config, is_mtp)):
            found.setdefault(message, []).append(layer.moe)
    for message, modules in found.items():
        yield from FindingsAbout("config-mismatch", modules, message, hint=_HINT)
    yield from _layers(config, parts, vectors)
    yield from _norms(config, parts, types, vectors)
    yield from of_routers


def _sizes(layer: MoELayer, part: Part, config: ModelConfig, known: Known | Unknown) -> Iterator[str]:
    """The sizes of the experts that config.json does not have."""
    stated = part.get("hidden_size")
    if type(stated) is int and layer.hidden not in _values(part, _HIDDEN):
        yield f"config.json has hidden_size {stated}, but the experts have {layer.hidden}"
    latent = None if isinstance(known, Unknown) else known.hidden_size()
    if latent is not None and layer.hidden != latent:
        yield f"config.json has a latent width of {latent}, but the experts have {layer.hidden}"
    inner = _values(part, _INNER)
    if inner and config.rank.is_whole and layer.intermediate not in inner:
        sizes = ", ".join(map(str, sorted(inner)))
        yield f"config.json has intermediate sizes {sizes}, but the experts have {layer.intermediate}"


def _values(part: Part, pattern: re.Pattern[str]) -> set[int]:
    """The numbers under keys of a pattern, those in lists and in parts about experts too."""
    found: set[int] = set()
    for key, value in part.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found |= _values(value, pattern)
        elif isinstance(key, str) and pattern.search(key):
            found.update(item for item in (value if isinstance(value, list) else [value]) if type(item) is int)
    return found


def _density(layer: MoELayer, part: Part, config: ModelConfig, is_mtp: Callable[[str], bool]) -> Iterator[str]:
    """The setting by which a layer that stores experts has none."""
    number = layer.index
    if is_mtp(layer.prefix) or config.hidden_layers is None or number >= config.hidden_layers:
        return
    for key, is_dense in _DENSE.items():
        value = part.get(key)
        if value is not None and is_dense(value, number):
            yield f"config.json has {key} = {value!r:.60}, but layers that it makes dense store experts"


def _is_multiple(value: object, number: int) -> bool:
    return type(value) is int and value > 1 and (number + 1) % value != 0


_DENSE: Final[Mapping[str, Callable[[Any, int], bool]]] = {
    "first_k_dense_replace": lambda value, number: type(value) is int and number < value,
    "mlp_only_layers": lambda value, number: isinstance(value, list) and number in value,
    "decoder_sparse_step": _is_multiple,
    "moe_layer_freq": lambda value, number: (
        (type(value) is int and value > 1 and number % value != 0)
        or (isinstance(value, list) and number < len(value) and value[number] in (0, False))
    ),
    "moe_layers": lambda value, number: isinstance(value, list) and bool(value) and number not in value,
    "mlp_layer_types": lambda value, number: (
        isinstance(value, list) and number < len(value) and value[number] == "dense"
    ),
}
"""Setting -> whether by its value the layer of a number is dense: those of deepseek, qwen, llama4 and transformers."""


def _layers(config: ModelConfig, known: list[tuple[MoELayer, Part]], vectors: tuple[str, ...]) -> Iterator[Finding]:
    """Decoder layers of which nothing is stored, and those beyond the number in config.json."""
    main = next((layer for layer, part in known if part is config.text), None)
    root = None if main is None else _LAYER.match(f"{main.moe}.")
    count = config.hidden_layers
    if root is None or count is None or count > _MAX_LAYERS:
        return
    stored = {int(found[2]) for name in vectors if (found := _LAYER.match(name)) is not None and found[1] == root[1]}
    if not stored:
        return
    missing = [number for number in range(count) if number not in stored]
    beyond = sorted(number for number in stored if number >= count) if not config.mtp_layers else []
    yield from FindingsAbout(
        "config-mismatch",
        [f"{root[1]}{number}" for number in missing],
        f"config.json has {plural(count, 'layer')}, but {len(missing)} of them have no norm stored",
        hint=_HINT,
    )
    yield from FindingsAbout(
        "config-mismatch",
        [f"{root[1]}{number}" for number in beyond],
        f"config.json has {plural(count, 'layer')} and no multi-token prediction layers, "
        f"but {len(beyond)} more are stored",
        hint=_HINT,
    )


def _norms(
    config: ModelConfig,
    known: list[tuple[MoELayer, Part]],
    types: Mapping[str, TensorType],
    vectors: tuple[str, ...],
) -> Iterator[Finding]:
    """Norms of the language model's layers of another size than its hidden states."""
    width = config.text.get("hidden_size")
    blocks = tuple({f"{layer.moe.rpartition('.')[0]}." for layer, part in known if part is config.text})
    names = [name for name in vectors if name.endswith(_NORMS) and name.startswith(blocks)] if blocks else []
    other = [name for name in names if type(width) is int and types[name].shape != (width,)]
    yield from FindingsAbout(
        "config-mismatch", other, f"config.json has hidden_size {width}, which these norms do not have", hint=_HINT
    )


def _routers(
    known_of: Callable[[str], Known | Unknown], layers: tuple[MoELayer, ...], types: Mapping[str, TensorType]
) -> Iterator[Finding]:
    """Routers that are missing, or of another shape than the experts need."""
    wrong: list[str] = []
    for layer in layers:
        known = known_of(layer.moe)
        routing = layer_routing(known, layer)
        if isinstance(routing, Unknown):
            continue
        names = router_tensor_names(routing, layer.router_module, types.__contains__)
        for name, shape in router_shapes(routing, names, layer, hidden_size(known)):
            found = types.get(name)
            if found is None or not fits_router(name, found.shape, shape, names):
                wrong.append(name)
        if names.token_ids is not None and names.token_ids not in types:
            wrong.append(names.token_ids)
    yield from FindingsAbout(
        "router-mismatch",
        wrong,
        f"{plural(len(wrong), 'tensor')} of routers missing, or with a shape that does not fit the experts",
        hint="engines leave such a router uninitialized, or fail: export the model again",
    )


def merged_unlike(others: Groups, linears: Mapping[str, Form], in_float: Collection[str]) -> list[str]:
    """The linears that are not int8, and that engines merge with linears of a different type, which they refuse.

    Args:
        others: the modules that are not routed experts.
        linears: all linears.
        in_float: int8 modules that conversion dequantizes.
    """

    def kind(module: str) -> str:
        form = linears[module]
        return "float" if form.is_float or module in in_float else form.weight.dtype

    found = []
    for module in (name for (form, _), names in others.items() if not form.quantized for name in names):
        parent, _, leaf = module.rpartition(".")
        parts = (f"{parent}.{part}" for part in MERGED_WITH.get(leaf, ((), ()))[0])
        kinds = {kind(part) for part in parts if part in linears}
        if len(kinds) > 1 and (kind(module) == "float" or "I8" in kinds):
            found.append(module)
    return found


def merged_findings(others: Groups, linears: Mapping[str, Form], in_float: Collection[str]) -> Iterator[Finding]:
    """The finding about linears of :func:`merged_unlike`."""
    names = merged_unlike(others, linears, in_float)
    types = "float" if all(linears[name].is_float for name in names) else "FP8 or float"
    yield from FindingsAbout(
        "merged-mixed",
        names,
        f"{plural(len(names), 'linear')} in {types} that engines merge with linears of a different type",
        hint="vLLM and SGLang refuse such a model: quantize all parts alike, or none",
    )
