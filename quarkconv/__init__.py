"""Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints.

    import quarkconv

    inspection = quarkconv.inspect_checkpoint("Qwen3-30B-A3B-ptpc-int8")
    result = quarkconv.convert_checkpoint("Qwen3-30B-A3B-ptpc-int8", "fused-int8")
    verification = quarkconv.verify_checkpoint(result.output, source=result.source)

Importing this package, and inspecting, planning and converting, import neither torch nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quarkconv.convert.convert import convert_checkpoint, plan_conversion
from quarkconv.convert.results import ConversionResult
from quarkconv.errors import (
    HubError,
    InterruptedByUser,
    QuarkconvError,
    SourceError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from quarkconv.findings import Finding, Severity
from quarkconv.inspection.inspection import Inspection, inspect_checkpoint
from quarkconv.plan.plan import Plan
from quarkconv.progress import Progress

if TYPE_CHECKING:
    from quarkconv.evaluate.evaluation import evaluate_checkpoint
    from quarkconv.evaluate.results import Evaluation
    from quarkconv.load.experts import FusedExperts
    from quarkconv.load.load import load_fused_experts
    from quarkconv.verify.results import Verification
    from quarkconv.verify.verify import verify_checkpoint

__all__ = [
    "ConversionResult",
    "Evaluation",
    "Finding",
    "FusedExperts",
    "HubError",
    "Inspection",
    "InterruptedByUser",
    "Plan",
    "Progress",
    "QuarkconvError",
    "Severity",
    "SourceError",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "WriteError",
    "convert_checkpoint",
    "evaluate_checkpoint",
    "inspect_checkpoint",
    "load_fused_experts",
    "plan_conversion",
    "verify_checkpoint",
]

_NEED_TORCH = {
    "Evaluation": "quarkconv.evaluate.results",
    "evaluate_checkpoint": "quarkconv.evaluate.evaluation",
    "FusedExperts": "quarkconv.load.experts",
    "load_fused_experts": "quarkconv.load.load",
    "Verification": "quarkconv.verify.results",
    "verify_checkpoint": "quarkconv.verify.verify",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        from importlib import import_module

        return getattr(import_module(_NEED_TORCH[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("quarkconv")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
