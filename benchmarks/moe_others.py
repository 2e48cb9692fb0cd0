"""The other implementations that benchmarks/moe_int8.py times: vLLM's, Humming's, and torch's in bfloat16.

vLLM runs twice: with the configuration that it picks by itself ("default"), and with the best of a few ("tuned"): those
that won somewhere in a sweep of vLLM 0.25.1 over the four models at this many tokens. Humming runs as in vLLM's backend
(`humming_moe`). Each result is compared with ours before it is timed.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from moe_ceilings import time_graph

from quarkconv.kernels.arguments import ExpertsArguments, ExpertWeights
from quarkconv.kernels.pipeline import run_pipeline
from quarkconv.kernels.tables import Shape
from quarkconv.kernels.tune import EXPERTS_IN_ALL, Weights, make_call

MOST_DIFFERENCE = 0.03
"""Between ours and another implementation of W8A8, relative: what quantizing the activations costs by itself (0.019 to
0.030 in the results). Both round to other codes where their 16-bit values differ, and Humming's scales are bfloat16."""
# BLOCK_SIZE_M, _N, _K, GROUP_SIZE_M, num_warps, num_stages
VLLM_CONFIGS = {
    64: [(16, 64, 128, 1, 4, 3), (16, 64, 128, 1, 4, 5), *((16, 64, 256, 1, 4, stages) for stages in (3, 4, 5))],
    512: [(32, 128, 128, 1, 4, 4), (64, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 4)],
    4096: [(64, 128, 128, 16, 4, 4), (64, 128, 128, 16, 4, 3), (64, 256, 128, 1, 8, 4), (128, 128, 128, 16, 8, 4)],
}


class Implementation(Protocol):
    """Another forward of the same experts."""

    def time(self, calls: list[ExpertsArguments], repeats: int) -> dict[str, Any]:
        """The fields of a row: microseconds, and the relative difference from ours."""

    def compile(self, call: ExpertsArguments) -> None:
        """Run everything that :meth:`time` runs once, so that the caches on disk hold it."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM's `fused_experts`, with its own tiles and with each of :data:`VLLM_CONFIGS`."""

    fused_experts: Any
    override_config: Any
    make_config: Any
    version: str

    def runs(self, calls: list[ExpertsArguments]) -> list[Callable[[], torch.Tensor]]:
        """The forward of each call; swigluoai takes rows of gate and up in turn."""
        gate_up, down = calls[0].gate_up, calls[0].down
        more: dict[str, Any] = {}
        if calls[0].activation.name == "swigluoai":
            from vllm.model_executor.layers.fused_moe.activation import MoEActivation

            more["activation"], gate_up = MoEActivation.SWIGLUOAI, interleaved(gate_up)
        in_all = EXPERTS_IN_ALL.get((down.codes.shape[0], calls[0].top_k, calls[0].hidden, calls[0].intermediate))
        if in_all is not None:
            numbers = torch.arange(in_all, dtype=torch.int32, device=down.codes.device)
            more |= {"global_num_experts": in_all, "expert_map": numbers.where(numbers < down.codes.shape[0], -1)}
        config = self.make_config(
            w1_scale=gate_up.scale, w2_scale=down.scale, a1_scale=None, a2_scale=None, per_act_token_quant=True,
            w1_bias=gate_up.bias, w2_bias=down.bias,
        )  # fmt: skip

        def run(call: ExpertsArguments) -> Callable[[], torch.Tensor]:
            ids = call.topk_ids.where(call.topk_ids >= 0, down.codes.shape[0])  # any expert of another rank
            arguments = (call.hidden_states, gate_up.codes, down.codes, call.topk_weights, ids)
            return lambda: self.fused_experts(*arguments, quant_config=config, **more)

        return [run(call) for call in calls]

    def time(self, calls: list[ExpertsArguments], repeats: int) -> dict[str, Any]:
        runs = self.runs(calls)
        difference = difference_from_ours(runs[0](), calls[0])
        if not difference < MOST_DIFFERENCE:
            print(f"vLLM and ours differ by {difference:.4f}: not timed", file=sys.stderr)
            return {"vllm_difference": difference}
        default = time_graph(runs, repeats)
        best, which = default, "default"
        for name, tiles in vllm_tiles(calls[0].tokens):
            with self.override_config(tiles):
                taken = time_graph(runs, repeats)
            if taken < best:
                best, which = taken, name
        return {"vllm_default_us": default, "vllm_tuned_us": best, "vllm_tuned": which, "vllm_difference": difference}

    def compile(self, call: ExpertsArguments) -> None:
        [run] = self.runs([call])
        run()
        for _, tiles in vllm_tiles(call.tokens):
            with self.override_config(tiles):
                run()


@dataclass(frozen=True, slots=True)
class Humming:
    """Humming's products, on both projections in its layout."""

    module: ModuleType
    gate_up: Any
    down: Any

    def run(self, call: ExpertsArguments, locks: torch.Tensor) -> Callable[[], torch.Tensor]:
        forward: Callable[[], torch.Tensor] = self.module.make_run(call, self.gate_up, self.down, locks)
        return forward

    def time(self, calls: list[ExpertsArguments], repeats: int) -> dict[str, Any]:
        locks = self.module.make_locks(calls[0].hidden_states.device)
        runs = [self.run(call, locks) for call in calls]
        difference = difference_from_ours(runs[0](), calls[0])
        if not difference < MOST_DIFFERENCE:
            print(f"Humming and ours differ by {difference:.4f}: not timed", file=sys.stderr)
            return {"humming_difference": difference}
        return {"humming_us": time_graph(runs, repeats), "humming_difference": difference}

    def compile(self, call: ExpertsArguments) -> None:
        self.run(call, self.module.make_locks(call.hidden_states.device))()


@dataclass(frozen=True, slots=True)
class Bfloat16:
    """bfloat16 experts through torch's grouped product; the sorting by expert is part of it."""

    w13: torch.Tensor
    w2: torch.Tensor

    def run(self, call: ExpertsArguments) -> torch.Tensor:
        """The forward of a call."""
        experts = self.w13.shape[0]
        ids = call.topk_ids.flatten()
        order = ids.argsort(stable=True)
        ends = torch.zeros(experts, dtype=torch.int32, device=ids.device)
        ends = ends.scatter_add_(0, ids.long(), torch.ones_like(ids)).cumsum(0, dtype=torch.int32)
        rows = call.hidden_states[order // call.top_k]
        gate, up = torch._grouped_mm(rows, self.w13.transpose(1, 2), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.w2.transpose(1, 2), offs=ends)
        y = y * call.topk_weights.flatten()[order].unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(call.hidden_states).index_add_(0, order // call.top_k, y)

    def time(self, calls: list[ExpertsArguments], repeats: int) -> dict[str, Any]:
        runs = [lambda call=call: self.run(call) for call in calls]
        return {"torch_bf16_us": time_graph(runs, max(repeats // 2, 1))}

    def compile(self, call: ExpertsArguments) -> None:
        """Nothing is compiled at run time."""


@dataclass(frozen=True, slots=True)
class Others:
    """What can be imported."""

    vllm: Vllm | None
    humming: ModuleType | None

    def of_shape(self, shape: Shape, weights: Weights, *, biased: bool) -> list[Implementation]:
        """Those that run a shape in INT8. Humming takes no biases, and no routing to experts of other ranks."""
        found: list[Implementation] = [] if self.vllm is None else [self.vllm]
        if self.humming is not None and not biased and shape not in EXPERTS_IN_ALL:
            call = make_call(shape, weights, 1)
            parts = (self.humming.repack(call.gate_up, 2), self.humming.repack(call.down, 1))
            found.append(Humming(self.humming, *parts))
        return found


def load_others() -> Others:
    """vLLM and Humming, where they can be imported."""
    vllm, humming = None, None
    try:
        import vllm as package
        from vllm.model_executor.layers.fused_moe import fused_experts, override_config
        from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config

        vllm = Vllm(fused_experts, override_config, int8_w8a8_moe_quant_config, package.__version__)
    except ImportError as error:
        print(f"vLLM cannot be imported: {error}", file=sys.stderr)
    try:
        import humming_moe as humming
    except ImportError as error:
        print(f"Humming cannot be imported: {error}", file=sys.stderr)
    return Others(vllm, humming)


def interleaved(part: ExpertWeights) -> ExpertWeights:
    """The same experts with a row of gate and one of up in turn."""

    def mixed(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2).contiguous()

    bias = None if part.bias is None else mixed(part.bias)
    return dataclasses.replace(part, codes=mixed(part.codes), scale=mixed(part.scale), bias=bias)


def vllm_tiles(tokens: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Names and tiles of the few that are timed at a number of tokens."""
    listed = min(VLLM_CONFIGS, key=lambda size: max(size / tokens, tokens / size) if tokens > 64 else size)
    for block_m, block_n, block_k, group, warps, stages in VLLM_CONFIGS[listed]:
        tiles = {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": block_k, "GROUP_SIZE_M": group}
        name = f"{block_m}x{block_n}x{block_k} group {group} warps {warps} stages {stages}"
        yield name, tiles | {"SPLIT_K": 1, "num_warps": warps, "num_stages": stages}


def difference_from_ours(found: torch.Tensor, call: ExpertsArguments) -> float:
    """||found - ours|| / ||ours||; 0 where both are 0, as on a rank that has no expert of any token."""
    ours = run_pipeline(call, torch.empty_like(call.hidden_states)).double()
    difference, norm = (part.norm().item() for part in (found.double() - ours, ours))
    return difference / norm if norm else difference
