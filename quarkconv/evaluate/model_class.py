"""config.json -> the model's transformers class on the meta device. Code of a checkpoint never runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch

from quarkconv.errors import UnsupportedError, UsageError

_OLDEST: Final = (5, 0)
"""The first release of transformers with one mapping of checkpoint names for loading."""
_AUTO_CLASSES: Final = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""Where a class with a head is looked for; models of text and images have one of the second only."""

_SAME_CLASS: Final = {"kimi_k2": "deepseek_v3"}
"""Model types without a class in transformers -> the type whose class computes the same. vLLM 0.33 reads kimi_k2 so,
transformers_utils/config.py; configs of Kimi-K2 name DeepseekV3ForCausalLM."""


def meta_model(root: Path) -> tuple[Any, torch.dtype]:
    """A transformers model without weights, in evaluation mode, and the dtype of its floats.

    Args:
        root: directory with config.json.

    Raises:
        UnsupportedError: transformers has no class for the model type.
        UsageError: transformers is missing or too old.
    """
    transformers = _transformers()
    try:
        config = _config(transformers, root)
    except Exception as error:  # transformers raises ValueError, KeyError, OSError and its own
        raise _no_class(root, error) from error
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = stated if isinstance(stated, torch.dtype) else torch.bfloat16
    known = [item for item in _AUTO_CLASSES if type(config) in getattr(transformers, item)._model_mapping]
    auto = getattr(transformers, (known or _AUTO_CLASSES)[0])
    try:
        whole = None if known else _config_around(config, auto := getattr(transformers, _AUTO_CLASSES[1]))
        with torch.device("meta"):
            model = auto.from_config(whole or config, trust_remote_code=False, dtype=dtype)
    except Exception as error:
        raise _no_class(root, error) from error
    if whole is not None:
        _keep_text(model)
    return model.eval(), dtype


def _config(transformers: Any, root: Path) -> Any:
    settings, _ = transformers.PreTrainedConfig.get_config_dict(root)
    other = _SAME_CLASS.get(settings.pop("model_type", None))
    if other is None:
        return transformers.AutoConfig.from_pretrained(root, trust_remote_code=False)
    return transformers.AutoConfig.for_model(other, **settings)


def _config_around(config: Any, auto: Any) -> Any | None:
    """The config of a model of text and images whose text part has this one; None where there is none.

    Such a text model has no class with a head of its own: step3p5 is the text part of step3p7.
    """
    for whole in auto._model_mapping:
        if whole.sub_configs.get("text_config") is type(config):
            return whole(text_config=config.to_dict())
    return None


def _keep_text(model: Any) -> None:
    """Remove what a model of text and images has beside the decoder and the head."""
    decoder = model.get_decoder()
    for name, module in list(model.base_model.named_children()):
        if module is not decoder:
            setattr(model.base_model, name, None)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError("evaluate needs transformers", hint="pip install 'transformers>=5' tokenizers") from error
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if version < _OLDEST:
        raise UsageError(
            "transformers is too old",
            expected="5.0 or later",
            found=transformers.__version__,
            hint="pip install -U transformers",
        )
    return transformers


def _no_class(root: Path, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "transformers has no class for this model",
        file=str(root / "config.json"),
        found=str(error).splitlines()[0].split(". ")[0][:200],
        hint="quarkconv never runs code from a checkpoint; `quarkconv verify` checks each layer without a class",
    )
