"""Our forward as the experts of vLLM's modular MoE kernel."""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym, kInt8StaticChannelSym
from vllm.platforms import current_platform

from quarkconv.kernels import fused_experts_int8
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.warm_up import warm_up

SCHEME = (kInt8StaticChannelSym, kInt8DynamicTokenSym)
"""vLLM's keys of weights and activations: per channel, per token. Weights per tensor and static activations run too:
`method` gives each row the scale of its tensor, and each expert its static scale."""

_WARM: set[Any] = set()
"""What `warm_up` has compiled in this process."""


def activation_arguments(activation: MoEActivation, config: Any) -> dict[str, Any] | None:
    """The arguments of `fused_experts_int8` for an activation of vLLM with the parameters of its MoE config.

    None for an activation that the kernels do not have. "swigluoai" is one: vLLM interleaves its gate and up rows.
    """

    def parameter(name: str) -> float | None:
        return getattr(config, name, None)

    limit, name = parameter("swiglu_limit"), activation.value
    if name == "silu":
        return {"activation": "silu", "activation_limit": limit}
    if name == "swigluoai_uninterleave":
        alpha = parameter("swiglu_alpha")
        offered = limit is not None and alpha is not None and parameter("swiglu_beta") == 1.0
        swigluoai = {"activation": "swigluoai", "activation_limit": limit, "activation_alpha": alpha}
        return swigluoai if offered else None
    if name == "situ":
        beta, linear = parameter("activation_situ_beta"), parameter("activation_situ_linear_beta")
        bounded = linear if linear is not None and linear > 0 else None
        situ = {"activation": "situ", "activation_alpha": beta, "activation_limit": bounded}
        return situ if beta is not None else None
    plain = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "swiglustep": "swiglustep", "relu2_no_mul": "relu2"}
    return {"activation": plain[name]} if name in plain and limit is None else None


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The ids of this rank's experts for ids [M, K] of all; -1 for experts of other ranks, and for -1.

    expert_map  int32 [experts of all ranks]: the id on this rank, or -1; None if it has all
    """
    if expert_map is None:
        return topk_ids
    return torch.cat([expert_map, expert_map.new_full((1,), -1)])[topk_ids]  # -1 finds the last


def first_expert(expert_map: torch.Tensor | None) -> int | None:
    """The first of this rank's experts where they follow each other; None where they do not, or it has all or none.

    Their ids on this rank are then those of all ranks less that of the first. Reads the map from the device.
    """
    if expert_map is None:
        return None
    ids = expert_map.tolist()
    first = ids.index(0) if 0 in ids else 0
    own = [expert - first for expert, local in enumerate(ids) if local >= 0]
    return first if own and own == [local for local in ids if local >= 0] == list(range(len(own))) else None


class QuarkconvExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Quantizes, sorts by expert, multiplies, activates and reduces in `fused_experts_int8`.

    Tokens come in bfloat16 or float16. Shared experts, the dispatch to ranks and the reduction over them stay vLLM's.
    """

    _kept: dict[str, Any] | None = None
    _placed: tuple[torch.Tensor | None, int | None] = (None, None)

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        """Whether a layer can run on these experts, and why not."""
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if supported and activation_arguments(moe_config.activation, moe_config) is None:
            return False, f"kernel does not support the parameters of {moe_config.activation.value} activation"
        if supported and moe_config.in_dtype not in (torch.bfloat16, torch.float16):
            return False, f"kernel does not support activations of {moe_config.in_dtype}"
        return supported, reason

    @staticmethod
    def activation_format() -> Any:
        """Tokens in one batch [M, H]."""
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Codes of the tokens are computed here."""
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cuda_alike() or current_platform.is_xpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == SCHEME

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation.value in (
            "silu",
            "gelu",
            "gelu_tanh",
            "swigluoai_uninterleave",
            "swiglustep",
            "situ",
            "relu2_no_mul",
        )

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        """Tensor and expert parallel; not data parallel, whose dispatch of unquantized tokens was not run.

        Nor `--all2all-backend passthrough` (0.32 on), whose experts reduce over the ranks themselves.
        """
        passthrough = getattr(moe_parallel_config, "use_passthrough_all2all", False)
        return moe_parallel_config.dp_size == 1 and not moe_parallel_config.use_all2all_kernels and not passthrough

    @staticmethod
    def _supports_batch_invariance() -> bool:
        """A token's result does not depend on the others of the batch."""
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        """The result is weighted and summed over a token's experts."""
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], ...]:
        """No workspaces, since the forward allocates its own; the result is [M, K], where K is the hidden size."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the weighted sum over each token's experts on this rank to output [M, H].

        hidden_states  bfloat16 or float16 [M, H], already multiplied by the router weight if that is on the input
        w1, w2         int8 [E, 2I, H] and [E, H, I] of the experts on this rank
        topk_weights   float [M, K]
        topk_ids       int32 or int64 [M, K], ids of the experts of all ranks
        """
        assert a1q_scale is None  # expects_unquantized_inputs
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        self.forward(hidden_states, w1, w2, weights, topk_ids, activation, expert_map, out=output)

    def forward(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        expert_map: torch.Tensor | None,
        *,
        apply_router_weight_on_input: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum over each token's experts on this rank, [M, H], written to `out` where given.

        The arguments are those of `apply`; here the router weight is still to be applied to the input.
        """
        return fused_experts_int8(
            hidden_states,
            w1,
            w2,
            self.w1_scale,
            self.w2_scale,
            topk_weights.float(),
            self._local_ids(topk_ids, expert_map),
            apply_router_weight_on_input=apply_router_weight_on_input,
            out=out,
            **self._options(activation),
        )

    def warm_up(
        self,
        w1: torch.Tensor,
        w2: torch.Tensor,
        activation: MoEActivation,
        most_tokens: int,
        *,
        apply_router_weight_on_input: bool = False,
    ) -> None:
        """Compile what layers with such weights launch for up to so many tokens, once in a process."""
        shape = (w1.device, *w1.shape, activation, self.moe_config.in_dtype, most_tokens, apply_router_weight_on_input)
        scales = (self.a1_scale, self.w1_bias)
        key = (*shape, self.moe_config.experts_per_token, *(scale is None for scale in scales))
        if key in _WARM:
            return
        _WARM.add(key)
        x = w1.new_zeros((1, w1.shape[2]), dtype=self.moe_config.in_dtype)
        ids = w1.new_zeros((1, self.moe_config.experts_per_token), dtype=torch.int32)
        options = self._options(activation) | {"apply_router_weight_on_input": apply_router_weight_on_input}
        warm_up(check_arguments(x, w1, w2, self.w1_scale, self.w2_scale, ids.float(), ids, **options), most_tokens)

    def place(self, expert_map: torch.Tensor | None) -> None:
        """Read which experts this rank has from the map that calls of `forward` will have."""
        self._placed = (expert_map, first_expert(expert_map))

    def _local_ids(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
        """Ids of this rank's experts; of all others, ids that are negative or too large: the kernels skip both."""
        placed, first = self._placed
        if first is None or placed is not expert_map:
            return local_ids(topk_ids, expert_map)
        return topk_ids - first if first else topk_ids

    def _options(self, activation: MoEActivation) -> dict[str, Any]:
        """The arguments of the forward that every call of a layer has, which has one activation."""
        if self._kept is None:
            options = activation_arguments(activation, self.moe_config)
            assert options is not None  # is_supported_config
            static = {"w13_input_scale": self.a1_scale, "w2_input_scale": self.a2_scale}
            self._kept = {**options, **static, "w13_bias": self.w1_bias, "w2_bias": self.w2_bias}
        return self._kept
