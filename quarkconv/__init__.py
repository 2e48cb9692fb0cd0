"""Inspect, convert and verify AMD Quark INT8 mixture-of-experts checkpoints.

    import quarkconv

    inspection = quarkconv.inspect_checkpoint("Qwen3-30B-A3B-ptpc-int8")
    result = quarkconv.convert_checkpoint("Qwen3-30B-A3B-ptpc-int8", "fused-int8")
    verification = quarkconv.verify_checkpoint(result.output, source=result.source)

Importing this package, and inspecting, planning and converting, import neither torch nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from quarkconv.progress import Progress
from quarkconv.version import own_version

if TYPE_CHECKING:
    from quarkconv.convert.convert import convert_checkpoint, plan_conversion
    from quarkconv.convert.results import ConversionResult
    from quarkconv.evaluate.evaluation import evaluate_checkpoint
    from quarkconv.evaluate.request import Limits
    from quarkconv.evaluate.results import Evaluation
    from quarkconv.inspection.inspection import Inspection, inspect_checkpoint
    from quarkconv.load.experts import FusedExperts
    from quarkconv.load.load import load_fused_experts
    from quarkconv.plan.plan import Plan
    from quarkconv.plan.shares import Share
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
    "Limits",
    "Plan",
    "Progress",
    "QuarkconvError",
    "Severity",
    "Share",
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

_MODULES = {
    "ConversionResult": "quarkconv.convert.results",
    "Evaluation": "quarkconv.evaluate.results",
    "FusedExperts": "quarkconv.load.experts",
    "Inspection": "quarkconv.inspection.inspection",
    "Limits": "quarkconv.evaluate.request",
    "Plan": "quarkconv.plan.plan",
    "Share": "quarkconv.plan.shares",
    "Verification": "quarkconv.verify.results",
    "convert_checkpoint": "quarkconv.convert.convert",
    "evaluate_checkpoint": "quarkconv.evaluate.evaluation",
    "inspect_checkpoint": "quarkconv.inspection.inspection",
    "load_fused_experts": "quarkconv.load.load",
    "plan_conversion": "quarkconv.convert.convert",
    "verify_checkpoint": "quarkconv.verify.verify",
}
"""Where names are that are imported on first use: a command imports its own package only, and few need torch."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    if name == "__version__":
        return own_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
