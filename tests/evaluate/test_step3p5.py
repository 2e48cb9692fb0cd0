"""Step-3.5, of which transformers has a class only as the text part of Step-3.7, with its experts in three matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.logits import streamed, whole
from support.step3p5 import text_alone, text_and_images

from quarkconv import convert_checkpoint, evaluate_checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_and_images(tmp_path_factory.mktemp("step3p7") / "model")


@pytest.fixture(scope="module")
def text(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_alone(images, tmp_path_factory.mktemp("step3p5") / "model")


def test_its_logits_are_those_of_the_text_part(images: Path, text: Path) -> None:
    ids = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(streamed(text, ids), whole(images, ids))


@pytest.mark.parametrize("target", ["compressed-tensors", "fused-int8"])
def test_experts_in_three_matrices_run_in_int8(text: Path, target: str, tmp_path: Path) -> None:
    model = convert_checkpoint(text, "compressed-tensors", tmp_path / "int8", quantize="all").output
    if target != "compressed-tensors":
        model = convert_checkpoint(model, target, tmp_path / "converted").output
    ids = tmp_path / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 48, (3, 24), generator=torch.Generator().manual_seed(3))}, ids)
    found = evaluate_checkpoint(model, text, token_ids=ids, batch=2, device="cpu", resume=False)
    assert found.int8 is not None
    assert 0 < found.int8.mean < 0.1
    assert all(0 < layer.own < 0.05 for layer in found.layers)
    assert [sum(layer.load) for layer in found.layers] == [0, *[3 * 24 * 2] * 3]
    assert found.float_experts == ()
    assert len(found.experts) == 5
