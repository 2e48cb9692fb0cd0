"""Every finding code, each triggered by one change of a sound model: the cases are in tests/support/findings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.findings import O_PROJ, Case, claims, experts, files, tensors
from support.model import Model

from quarkconv import inspect_checkpoint
from quarkconv.findings import CODES, finding

CASES = (*files.CASES, *claims.CASES, *tensors.CASES, *experts.CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_change_has_exactly_these_findings(case: Case, tmp_path: Path) -> None:
    model = Model()
    case.change(model)
    folder = model.write(tmp_path)
    case.damage(folder)

    inspection = inspect_checkpoint(folder, deep=case.deep)

    found = [(item.severity.value, item.code, item.subject, item.count) for item in inspection.findings]
    assert sorted(found) == sorted(case.expected)
    assert inspection.ok is all(severity != "error" for severity, *_ in case.expected)


OF_CONVERSIONS = {"setting-dropped", "tensor-dropped", "module-dequantized", "mtp-dropped", "left-in-float"}
"""Found of a conversion, not of a checkpoint: tests/targets/test_settings.py, tests/cases."""
OF_LONGCAT = {"identity-experts"}
"""In tests/cases/test_identity_experts.py."""
OF_ASCEND = {"description-mismatch"}
"""In tests/targets/test_ascend.py."""
HOSTILE = {"file-outside", "index-total-size", "tensor-name", "weight-shape", "scale-subnormal"}
"""Found of checkpoints that somebody made to deceive: tests/hostile."""


def test_every_code_is_triggered() -> None:
    found_elsewhere = OF_CONVERSIONS | OF_LONGCAT | OF_ASCEND | HOSTILE
    assert {code for case in CASES for _, code, _, _ in case.expected} == set(CODES) - found_elsewhere


def test_errors_come_first_then_warnings_then_info(tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.weight_scale", torch.tensor(0.5).bfloat16())
    severities = [item.severity.value for item in inspect_checkpoint(model.write(tmp_path)).findings]
    assert severities == ["error", "warning", "info"]


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(KeyError):
        finding("no-such-code", "subject", "message")


@pytest.mark.parametrize("code", CODES)
def test_codes_are_kebab_case_and_explained(code: str) -> None:
    assert code == code.lower()
    assert code.replace("-", "").isalpha()
    assert CODES[code].meaning.endswith(".")
