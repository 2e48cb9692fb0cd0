"""The attention backend of a CPU in place of a sparse one, of which a CPU has none."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend


class SparseAttention(CPUMLABackend):  # type: ignore[misc]
    """That of DeepSeek V3."""

    @staticmethod
    def get_impl_cls() -> Any:
        """Creates the part that computes, which loading does not call."""
        return lambda topk_indices_buffer, **rest: CPUMLABackend.get_impl_cls()(**rest)  # noqa: ARG005
