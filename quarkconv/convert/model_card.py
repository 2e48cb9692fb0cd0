"""The model card of a converted checkpoint: the card of the source with a section on the conversion."""

from __future__ import annotations

import re
from typing import Final

from quarkconv.version import own_version

CARD_NAME: Final = "README.md"
MAX_CARD_BYTES: Final = 2**17
"""A longer README.md is copied unchanged: parsing a megabyte of YAML takes seconds."""

_BEGIN, _END = "<!-- quarkconv -->", "<!-- /quarkconv -->"
_SECTION: Final = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)


def converted_card(text: str, target: str, summary: str, facts: str, base_model: str | None) -> str | None:
    """Add a section on the conversion to a model card, or replace an earlier one.

    Args:
        text: README.md of the source.
        target, summary: name and description of the target.
        facts: one sentence on the weights.
        base_model: Hub repo id of the source, for the metadata; None for a local directory.

    Returns:
        The new text; None if the metadata cannot be read, so that the card should be copied unchanged.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
        if base_model is not None:
            card.data["base_model"] = base_model
            card.data["base_model_relation"] = "quantized"
            text = str(card)
    except Exception:  # YAML fails in many ways, and a bad card should not stop a conversion
        return None
    section = (
        f"{_BEGIN}\n## Conversion\n\n"
        f"The weights were written as `{target}` by quarkconv {own_version()}: {summary}. {facts}\n\n"
        "`quarkconv.json` lists every piece with its checksum; `quarkconv verify` checks them, and the numbers.\n"
        f"{_END}\n"
    )
    return f"{_SECTION.sub(chr(10), text).rstrip()}\n\n{section}"
