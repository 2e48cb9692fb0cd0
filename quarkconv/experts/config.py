"""The one reader of the model part of config.json: the type, the experts, the layers, and where the quantization is.

Multimodal models nest the config of their language model, and some models have several stacks of layers, each with a
config of its own. No other module reads config.json for these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quarkconv.experts.family import EXPERT_COUNT
from quarkconv.experts.ranks import WHOLE, Rank, rank_of_config

QUANTIZATION_KEY: Final = "quantization_config"
_COMPRESSION_KEY: Final = "compression_config"
"""Key of a compressed-tensors config in older exports, which vLLM and SGLang read where the other one is absent."""
LANGUAGE_PARTS: Final = ("text_config", "llm_config", "language_config")
"""Keys of the object that describes the language model of a multimodal model."""
STACKS: Final[Mapping[str, str]] = {"thinker": "thinker_config", "talker": "talker_config"}
"""Models of several stacks of layers: first part of a module's name -> key of the stack's object. The first row is the
language model."""

_BESIDE: Final[Mapping[str, str]] = {
    "vision_tower": "vision_config",
    "vision_model": "vision_config",
    "vision_encoder": "vision_config",
    "visual": "vision_config",
    "audio_tower": "audio_config",
    "audio_encoder": "audio_config",
    "encoder": "encoder",
}
"""Part of a module's name before its layers -> key of the object that describes them, at the top of config.json."""
_LANGUAGE: Final = re.compile(
    r"model|language(_model)?|llm|text_model|transformer|backbone|decoder|mtp(_\w+)?"
    r"|module|_orig_mod|_fsdp_wrapped_module|base_model"
)
"""Parts of a module's name before the layers of the language model, those of wrappers around the model too."""
_NUMBERED: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|decoder_layer)\.\d")
"""The layers of a stack in a module's name."""

_TOP_K: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
    "moe_k",
)
_ACTIVATION: Final = ("hidden_act", "hidden_activation", "moe_hidden_act", "mlp_hidden_act", "ffn_act_fn")
_HIDDEN_LAYERS: Final = ("num_hidden_layers", "n_layers", "num_layers")
_MTP_LAYERS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
_EXPERT_PARTS: Final = ("ffn_config",)
"""Keys of the object below the language model's that describes its experts, where they have one."""

Part = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model by config.json; None for fields that are missing or have the wrong type.

    Attributes:
        raw: the whole of config.json.
        path: keys from there to the part that describes the language model; () for config.json itself.
        model_type: ``model_type`` of the language model.
        experts: routed experts per layer.
        top_k: experts per token.
        hidden_layers: decoder layers, without those of multi-token prediction.
        mtp_layers: layers of multi-token prediction.
        activation: name of the activation function of the experts.
        quantization: the quantization_config, of any type.
        other_quantizations: parts of config.json that hold another one, which is not read.
        rank: the rank whose part of the experts the checkpoint holds.
    """

    raw: Part
    path: tuple[str, ...] = ()
    model_type: str | None = None
    experts: int | None = None
    top_k: int | None = None
    hidden_layers: int | None = None
    mtp_layers: int | None = None
    activation: str | None = None
    quantization: object = None
    other_quantizations: tuple[str, ...] = ()
    rank: Rank = WHOLE

    @property
    def text(self) -> Part:
        """The part that describes the language model."""
        return _at(self.raw, self.path)

    @property
    def local_experts(self) -> int | None:
        """Routed experts per layer that the checkpoint itself holds."""
        return None if self.experts is None else _length(self.rank.experts(self.experts))

    def part_of(self, module: str) -> Part | None:
        """The part that describes the stack of layers of a module: ``thinker.model.layers.0`` or any other name.

        None for a stack beside the language model, such as an encoder or a draft model, without an object of its own.
        """
        stack = stack_of(module)
        inner = self.raw.get(STACKS.get(stack) or _BESIDE.get(stack, ""))
        if isinstance(inner, dict):
            return _at(inner, _language_path(inner))
        return self.text if not stack or stack in STACKS else None

    def local_experts_of(self, module: str, divided: bool = True) -> int | None:
        """Routed experts per layer that the checkpoint itself holds, in the stack of layers of a module.

        Args:
            module: below the stack.
            divided: whether the layer is one of those that ranks divide, which are in int8.
        """
        part = self.part_of(module)
        if part is None:
            return None
        count = self.experts if part is self.text else _first_count(_with_expert_parts(part), EXPERT_COUNT)
        return None if count is None else _length(self.rank.experts(count)) if divided else count

    def without_mtp(self, counted_in: int) -> dict[str, Any]:
        """A copy of config.json that claims no layers of multi-token prediction.

        Args:
            counted_in: how many of them the number of decoder layers counts in.
        """
        return _without_mtp(self.raw, self.path, counted_in)

    def with_quantization(self, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
        """A copy of config.json with another quantization_config, at the top, or with none anywhere."""
        replaced = _without_quantization(self.raw, [path for path in _part_paths(self.raw) if path])
        if quantization is not None:
            replaced[QUANTIZATION_KEY] = dict(quantization)
        return replaced


def stack_of(module: str) -> str:
    """The part of a module's name that tells its stack of layers from others; empty for that of the language model.

    >>> stack_of("thinker.model.layers.0.mlp"), stack_of("model.visual.blocks.0"), stack_of("model.layers.0.mlp")
    ('thinker', 'visual', '')
    >>> stack_of("draft_model.layers.0.mlp")
    'draft_model'
    """
    layers = _NUMBERED.search(module)
    parts = (module if layers is None else module[: layers.start()]).split(".")
    if parts[0] in STACKS:
        return parts[0]
    beside = next((part for part in parts if part in _BESIDE), "")
    if beside or layers is None:
        return beside
    return next((part for part in parts if part and not _LANGUAGE.fullmatch(part)), "")


def model_config(raw: Part) -> ModelConfig:
    """Read the model part of a config.json; values of the wrong type count as absent."""
    path = _language_path(raw)
    text = _at(raw, path)
    parts = _with_expert_parts(text)
    model_type = text.get("model_type", raw.get("model_type"))
    quantizations = [
        (found, path) for path in _part_paths(raw) if (found := _at(raw, path).get(QUANTIZATION_KEY)) is not None
    ]
    quantizations += [(found, ()) for found in (raw.get(_COMPRESSION_KEY),) if found is not None]
    quantization = quantizations[0][0] if quantizations else None
    return ModelConfig(
        raw=raw,
        path=path,
        model_type=model_type if isinstance(model_type, str) else None,
        experts=_first_count(parts, EXPERT_COUNT),
        top_k=_first_count(parts, _TOP_K),
        hidden_layers=_first_count(parts, _HIDDEN_LAYERS),
        mtp_layers=_first_count(parts, _MTP_LAYERS),
        activation=_activation(parts),
        quantization=quantization,
        other_quantizations=tuple(
            dict.fromkeys(".".join(path) for found, path in quantizations[1:] if found != quantization)
        ),
        rank=rank_of_config(raw),
    )


def _length(numbers: range) -> int:
    """The length of a range, also beyond the largest that ``len`` returns: config.json may claim any number."""
    return numbers.stop - numbers.start


def _with_expert_parts(text: Part) -> tuple[Part, ...]:
    """The part about a stack of layers, and those in it about its experts."""
    return text, *(text[key] for key in _EXPERT_PARTS if isinstance(text.get(key), dict))


def _language_path(raw: Part) -> tuple[str, ...]:
    """Keys to the part that describes the language model."""
    stack = next((key for key in STACKS.values() if isinstance(raw.get(key), dict)), None)
    head = () if stack is None else (stack,)
    inner = _at(raw, head)
    part = next((key for key in LANGUAGE_PARTS if isinstance(inner.get(key), dict)), None)
    return head if part is None else (*head, part)


def _part_paths(raw: Part) -> Iterator[tuple[str, ...]]:
    """Keys to every part that may hold a quantization_config, the whole of config.json first."""
    yield ()
    for key in (*LANGUAGE_PARTS, *STACKS.values()):
        if isinstance(raw.get(key), dict):
            yield (key,)
            yield from ((key, inner) for inner in LANGUAGE_PARTS if isinstance(raw[key].get(inner), dict))
    for key, part in raw.items():
        if isinstance(part, dict) and isinstance(part.get(QUANTIZATION_KEY), dict):
            yield (key,)


def _at(raw: Part, path: tuple[str, ...]) -> Part:
    for key in path:
        raw = raw[key]
    return raw


def _without_quantization(raw: Part, paths: list[tuple[str, ...]]) -> dict[str, Any]:
    copied = {key: value for key, value in raw.items() if key not in (QUANTIZATION_KEY, _COMPRESSION_KEY)}
    for key in dict.fromkeys(path[0] for path in paths):
        copied[key] = _without_quantization(copied[key], [path[1:] for path in paths if path[0] == key and path[1:]])
    return copied


def _without_mtp(raw: Part, path: tuple[str, ...], counted_in: int) -> dict[str, Any]:
    copied = dict(raw)
    if path:
        copied[path[0]] = _without_mtp(raw[path[0]], path[1:], counted_in)
    for key in _HIDDEN_LAYERS if not path and counted_in else ():
        if type(copied.get(key)) is int:
            copied[key] -= counted_in
    for key in _MTP_LAYERS:
        if key in copied:
            copied[key] = 0
    if copied.get("use_mtp") is True:
        copied["use_mtp"] = False
    return copied


def _first_count(parts: tuple[Part, ...], keys: tuple[str, ...]) -> int | None:
    """The first positive number; a list with an entry for each layer counts where all of them are equal."""
    for part in parts:
        for key in keys:
            value = part.get(key)
            if isinstance(value, list) and value and all(type(item) is int and item == value[0] for item in value):
                value = value[0] if len(value) in (part.get(key) for key in _HIDDEN_LAYERS) else None
            if type(value) is int and value > 0:
                return value
    return None


def _activation(parts: tuple[Part, ...]) -> str | None:
    for part in parts:
        for key in _ACTIVATION:
            value = part.get(key)
            name = value.get("name") if isinstance(value, dict) else value
            if isinstance(name, str):
                return name
    return None
