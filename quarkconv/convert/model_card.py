"""The model card of a converted checkpoint: the source's, with what the conversion did."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Final

CARD_NAME: Final = "README.md"
MAX_CARD_BYTES: Final = 2**17
"""A longer README.md is copied as it is: reading YAML takes seconds for a megabyte."""

_BEGIN, _END = "<!-- quarkconv -->", "<!-- /quarkconv -->"
_SECTION: Final = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)


def converted_card(text: str, target: str, summary: str, facts: str, base_model: str | None) -> str | None:
    """The source's model card with a section on the conversion, in the place of an earlier one.

    Args:
        text: README.md of the source.
        target, summary: name of the target, and what it is.
        facts: one sentence on what became of the weights.
        base_model: repo id of the source, where it has one; goes into the metadata as ``base_model``.

    Returns:
        The text; None when the card's metadata cannot be read, and it should be copied as it is.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
        if base_model is not None:
            card.data["base_model"] = base_model
            card.data["base_model_relation"] = "quantized"
            text = str(card)
    except Exception:  # YAML has many ways to be wrong, and a card is no reason to refuse a model
        return None
    section = (
        f"{_BEGIN}\n## Conversion\n\n"
        f"The weights were written as `{target}` by quarkconv {version('quarkconv')}: {summary}. {facts}\n\n"
        "`quarkconv.json` lists every piece with its checksum; `quarkconv verify` checks them, and the numbers.\n"
        f"{_END}\n"
    )
    return f"{_SECTION.sub(chr(10), text).rstrip()}\n\n{section}"
