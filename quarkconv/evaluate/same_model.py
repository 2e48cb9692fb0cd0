"""Whether two checkpoints can be the same model before and after quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from quarkconv.description.description import Description
from quarkconv.errors import UsageError
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.windows import load_tokenizer

_NOT_COMPUTED_WITH: Final = frozenset(
    (
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "name_or_path",
        "pad_token_id",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
"""Settings of config.json that change no hidden state."""


def require_unquantized(description: Description) -> None:
    """Refuse a quantized model as the one before quantization.

    Raises:
        UsageError: the checkpoint holds quantized modules.
    """
    if description.schemes:
        raise UsageError(
            "The unquantized model is quantized",
            file=str(description.checkpoint.root),
            expected="a model in floats",
            found=description.scheme or "INT8 modules",
            hint="give --unquantized the model before it was quantized",
        )


def require_same_model(quantized: Skeleton, unquantized: Skeleton) -> None:
    """Refuse an unquantized model of another architecture.

    Raises:
        UsageError: class, number of layers or vocabulary differ.
    """
    for what, expected, found in (
        ("class", type(quantized.model).__name__, type(unquantized.model).__name__),
        ("number of layers", len(quantized.layers), len(unquantized.layers)),
        ("vocabulary", quantized.vocabulary, unquantized.vocabulary),
    ):
        if found != expected:
            raise UsageError(
                f"The unquantized model has a different {what}",
                file=str(unquantized.root),
                expected=str(expected),
                found=str(found),
                hint="give --unquantized the model before it was quantized",
            )


def config_differences(quantized: Skeleton, unquantized: Skeleton) -> tuple[str, ...]:
    """Settings that the two models compute with and that differ, such as ``hidden_act: silu, unquantized gelu``."""
    settings, others = (dict(_settings(item.model.config.to_dict())) for item in (quantized, unquantized))
    return tuple(
        f"{name}: {settings.get(name)}, unquantized {others.get(name)}"
        for name in sorted(settings.keys() | others.keys())
        if settings.get(name) != others.get(name)
    )


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if name in _NOT_COMPUTED_WITH or name.startswith("_"):
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def require_same_tokenizer(root: Path, other: Path) -> None:
    """Refuse an unquantized model with another vocabulary; a model without ``tokenizer.json`` is not checked.

    Raises:
        UsageError: the vocabularies differ.
    """
    files = [folder / "tokenizer.json" for folder in (root, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        vocabulary, other_vocabulary = (load_tokenizer(file).get_vocab() for file in files)
        if differing := vocabulary.items() ^ other_vocabulary.items():
            token, _ = min(differing, key=lambda item: (item[1], item not in vocabulary.items()))
            expected, found = (
                f"{len(item)} tokens, {token!r} " + (f"is {item[token]}" if token in item else "is missing")
                for item in (vocabulary, other_vocabulary)
            )
            raise UsageError(
                "The unquantized model has a different tokenizer",
                file=str(files[1]),
                expected=expected,
                found=found,
                hint="give --unquantized the model before it was quantized",
            )
