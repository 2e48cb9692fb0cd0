"""The model card of the output: the source's text and metadata stay, and the conversion is mentioned once."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.checkpoints import make_checkpoint
from support.program import snapshot

import quarkconv
from quarkconv.convert.model_card import MAX_CARD_BYTES, converted_card

CARD = """---
license: apache-2.0
base_model: Qwen/Qwen3-30B-A3B
tags:
- quark
---

# A model

Text with `code`, ---, and | tables |.
"""


def with_card(folder: Path, text: str | bytes) -> Path:
    root = make_checkpoint(folder)
    (root / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def convert(root: Path, target: str, out: Path) -> str:
    return (quarkconv.convert_checkpoint(root, target, out).output / "README.md").read_text()


def test_text_and_metadata_stay_and_the_conversion_is_mentioned(tmp_path: Path) -> None:
    text = convert(with_card(tmp_path / "model", CARD), "fused-int8", tmp_path / "out")
    assert text.startswith(CARD)
    card = ModelCard(text)
    assert card.data.to_dict() == ModelCard(CARD).data.to_dict()
    assert "## Conversion" in text
    assert "`fused-int8`" in text
    assert "bit for bit" in text
    assert "float32 and rounded once" in convert(tmp_path / "model", "bf16", tmp_path / "bf16")


def test_repeated_conversions_are_mentioned_once(tmp_path: Path) -> None:
    root = with_card(tmp_path / "model", CARD)
    first = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "1").output
    second = quarkconv.convert_checkpoint(first, "quark", tmp_path / "2").output
    third = quarkconv.convert_checkpoint(second, "fused-int8", tmp_path / "3").output
    assert (second / "README.md").read_text().count("## Conversion") == 1
    assert snapshot(third)["README.md"] == snapshot(first)["README.md"]


def test_a_repo_id_becomes_the_base_model() -> None:
    text = converted_card(CARD, "quark", "a form", "Facts.", "org/model-int8")
    assert text is not None
    metadata = ModelCard(text).data.to_dict()
    assert metadata["base_model"] == "org/model-int8"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "apache-2.0"
    assert "Text with `code`, ---, and | tables |." in text


def test_a_card_without_metadata_gets_none(tmp_path: Path) -> None:
    text = convert(with_card(tmp_path / "model", "Only text"), "quark", tmp_path / "out")
    assert text.startswith("Only text\n\n<!-- quarkconv -->")


def test_without_a_card_none_is_written(tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(make_checkpoint(tmp_path / "model"), "quark", tmp_path / "out").output
    assert not (out / "README.md").exists()


@pytest.mark.parametrize(
    "text",
    [b"---\nlicense: [\n---\ntext", b"---\n- a list\n---\ntext", b"\xff\xfe", b"x" * (MAX_CARD_BYTES + 1)],
    ids=["yaml", "list", "not text", "long"],
)
def test_a_card_that_cannot_be_read_is_copied_as_it_is(tmp_path: Path, text: bytes) -> None:
    root = with_card(tmp_path / "model", text)
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output
    assert (out / "README.md").read_bytes() == text


def test_a_changed_card_is_a_changed_output(tmp_path: Path) -> None:
    root = with_card(tmp_path / "model", CARD)
    plan = quarkconv.plan_conversion(root, "fused-int8")
    (root / "README.md").write_text(CARD + "More.")
    assert quarkconv.plan_conversion(root, "fused-int8") != plan
