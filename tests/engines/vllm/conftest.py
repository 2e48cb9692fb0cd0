"""Exports and what they convert to, made once for all tests with vLLM."""

from __future__ import annotations

import engines.vllm.loading  # noqa: F401  prepares vLLM for a machine without GPU, before any test imports it
import pytest
from engines.forms import Forms
from engines.vllm.exports import prepare
from support.exports import Checkpoints


@pytest.fixture(scope="session")
def forms(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """Checkpoints by export and form."""
    return Forms(checkpoints, tmp_path_factory.mktemp("forms"), prepare)
