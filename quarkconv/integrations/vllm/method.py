"""The method of an INT8 W8A8 MoE layer: vLLM's own creates and loads the parameters, our experts compute."""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, int8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend, make_int8_moe_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod

from quarkconv.integrations.vllm.experts import SCHEME, QuarkconvExperts

logger = init_logger("vllm.quarkconv")

STOCK = (CompressedTensorsW8A8Int8MoEMethod, QuarkW8A8Int8MoEMethod)
"""The methods of vLLM that are replaced."""

_READ = ("w13_input_scale", "w2_input_scale", "w13_bias", "w2_bias")
"""Parameters that the experts read as they are, where a layer has them; scales of weights they read per channel."""


def replace_method(stock: Any) -> Any:
    """Our method in the place of vLLM's for INT8 W8A8 experts; any other as it is.

    Layers that our experts do not support keep vLLM's method, and the log says why, once.
    """
    if not isinstance(stock, STOCK):
        return stock
    reason = unsupported(stock)
    own = getattr(stock, "int8_backend", None)
    if reason is not None:
        logger.warning_once("quarkconv: INT8 MoE layers stay on vLLM's own %s backend: %s", backend_name(own), reason)
        return stock
    others = str(["quarkconv", *(backend.value for backend in Int8MoeBackend)])
    logger.info_once(
        "Using quarkconv Int8 MoE backend in place of %s, out of potential backends: %s.", backend_name(own), others
    )
    return QuarkconvMoEMethod(stock)


def unsupported(stock: Any) -> str | None:
    """Why our experts cannot compute a layer, or None if they can."""
    backend = getattr(stock.moe, "moe_backend", "auto")
    if backend != "auto":
        return f"--moe-backend {backend} was requested"
    standard = mk.FusedMoEActivationFormat.Standard
    return QuarkconvExperts.is_supported_config(QuarkconvExperts, stock.moe, *SCHEME, standard)[1]


def backend_name(backend: Any) -> str:
    """vLLM's name of one of its backends, of which static activations have none (fused_experts runs them)."""
    return "fused_experts" if backend is None else str(backend.value)


class QuarkconvMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """INT8 W8A8 experts on ``quarkconv.kernels``.

    Parameters are those of ``stock``, vLLM's method for the layer, and stay in its layouts:

        codes                        int8 [E, 2I, H] and [E, H, I]; without gate [E, I, H]
        scales of weights            float32 [E, rows] or [E, rows, 1]; per tensor [E, 2] (gate and up) and [E]
        scales of static activations float32 [E]
    """

    def __init__(self, stock: Any) -> None:
        super().__init__(stock.moe)
        self.stock = stock
        self.experts_cls = QuarkconvExperts
        self._read: dict[str, torch.Tensor | None] = {}
        # Here, since vLLM 0.26 has no current config when it loads weights again.
        self._most_tokens: int = get_current_vllm_config().scheduler_config.max_num_batched_tokens

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Create vLLM's parameters of the layer."""
        self.stock.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the kernel of a layer that is loaded, and compile it for all numbers of tokens that vLLM batches.

        Raises ValueError for static activations with a zero point, and where their weights are loaded again: vLLM 0.33
        counts the scale of an expert's input once for gate and once for up, takes the layer for complete before its
        last scales, and leaves those as the memory was (``model_loader/reload/layerwise.py``).
        """
        if self.stock.static_input_scales and self._read:
            raise ValueError("quarkconv: vLLM leaves out scales when it loads int8_static experts again; restart vLLM")
        for name in ("w13", "w2"):
            zero_point = getattr(layer, f"{name}_input_zero_point", None)
            if self.stock.static_input_scales and zero_point is not None and bool(zero_point.any()):
                raise ValueError(
                    f"quarkconv: {name}_input_zero_point: expected 0 (symmetric static activations), "
                    f"found {zero_point[zero_point != 0][0].item()}; unset QUARKCONV_VLLM"
                )
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = make_int8_moe_kernel(
            int8_backend=Int8MoeBackend.TRITON,  # whose layout of the weights is the checkpoint's
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            experts_cls=self.experts_cls,
            routing_tables=layer._expert_routing_tables(),
        )
        assert not self.moe_kernel.can_overlap_shared_experts, "only vLLM's modular kernel would run shared experts"
        self.moe_kernel.fused_experts.place(layer.expert_map)
        self.moe_kernel.fused_experts.warm_up(
            layer.w13_weight,
            layer.w2_weight,
            layer.activation,
            self._most_tokens,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """Scales and biases as the experts take them: scales of weights per channel, float32 [E, rows, 1]."""
        read = {name: getattr(layer, name, None) for name in _READ}
        for name in ("w13", "w2"):
            scale, weight = getattr(layer, f"{name}_weight_scale"), getattr(layer, f"{name}_weight")
            read[f"{name}_weight_scale"] = channel_scale(scale, weight.shape[1])
        read = {name: self._in_place(name, tensor) for name, tensor in read.items()}
        return int8_w8a8_moe_quant_config(
            w1_scale=read["w13_weight_scale"],
            w2_scale=read["w2_weight_scale"],
            a1_scale=read["w13_input_scale"],
            a2_scale=read["w2_input_scale"],
            w1_bias=read["w13_bias"],
            w2_bias=read["w2_bias"],
            per_act_token_quant=not self.stock.static_input_scales,
        )

    def _in_place(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor that the experts read, in the memory of the first one of this name.

        CUDA graphs read the memory that they were captured with. When vLLM loads weights again, it processes them in
        new parameters, and then restores the old ones with the new values: the experts must not keep the new ones.
        """
        kept = self._read.get(name)
        if tensor is None or kept is None or (kept.shape, kept.device) != (tensor.shape, tensor.device):
            self._read[name] = tensor
            return tensor
        return kept.copy_(tensor)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The routed experts of tokens x [M, H]; shared experts are run by vLLM's runner.

        vLLM's modular kernel has nothing to do around the experts where no token goes to another rank, and its buffers
        and stages take the host a quarter of the time of the launches: it is passed by.
        """
        assert self.moe_kernel is not None
        result: torch.Tensor = self.moe_kernel.fused_experts.forward(
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            layer.activation,
            layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )
        return result


def channel_scale(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales of E experts with `rows` rows as [E, rows, 1].

    scale  [E, rows] or [E, rows, 1], of which the result is a view; or one for each of n equal parts, [E, n] or [E]:
           repeated for the rows of its part, so that no code changes
    """
    parts = scale.detach().reshape(scale.shape[0], -1)
    if parts.shape[1] != rows:
        parts = parts.repeat_interleave(rows // parts.shape[1], dim=1)
    return parts.unsqueeze(-1)
