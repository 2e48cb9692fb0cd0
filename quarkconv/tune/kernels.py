"""The INT8 kernels of engines, called on random weights as the engine calls them on a layer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

from quarkconv.errors import UnsupportedError
from quarkconv.tune.grid import Tile, tile_of
from quarkconv.tune.shapes import RankShape

if TYPE_CHECKING:
    import torch

    Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

Forward = Callable[[], object]
"""One forward of the experts of a layer, with the tile in use."""


@dataclass(frozen=True, slots=True)
class Routed:
    """One random input.

    Attributes:
        hidden_states: bfloat16 [M, H].
        topk_weights: float32 [M, k].
        topk_ids: int32 [M, k], among the experts of all ranks.
    """

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class Kernel(Protocol):
    """An engine's kernel."""

    variable: str
    """Environment variable by which the engine finds a folder of tables."""

    needs_contiguous_weights: bool
    """Whether it refuses weights whose experts are all the same memory (stride 0)."""

    def version(self) -> str:
        """``vllm 0.33.0``."""

    def table_path(self, folder: Path, shape: RankShape) -> Path:
        """The file in which the engine looks for the tiles of a shape, below the folder that the variable names."""

    def default(self, shape: RankShape, tokens: int) -> Tile:
        """What the engine chooses without a table of ours."""

    def using(self, tile: Tile) -> AbstractContextManager[object]:
        """A context in which forwards use this tile."""

    def forwards(self, shape: RankShape, weights: Weights, inputs: Sequence[Routed]) -> list[Forward]:
        """A forward for each input. The weights are those of :func:`quarkconv.kernels.tune.make_weights`."""


class VLLMKernel:
    """vLLM's Triton kernel, 0.26 to 0.33: ``fused_experts`` with per-channel weights and per-token activations."""

    variable = "VLLM_TUNED_CONFIG_FOLDER"
    needs_contiguous_weights = False

    def __init__(self) -> None:
        layers = "vllm.model_executor.layers.fused_moe"
        self._package = _module(layers)
        self._kernel = _module(f"{layers}.fused_moe")
        self._config = _module(f"{layers}.config")

    def version(self) -> str:
        """``vllm 0.33.0``."""
        return f"vllm {_module('vllm').__version__}"

    def table_path(self, folder: Path, shape: RankShape) -> Path:
        """``E=..,N=..,device_name=...json``: vLLM names no dtype for INT8 W8A8."""
        name: str = self._kernel.get_config_file_name(shape.experts, shape.intermediate, self.dtype())
        return folder / name

    def default(self, shape: RankShape, tokens: int) -> Tile:
        """A table that vLLM ships, which is one for BF16; else its rule of thumb."""
        w13 = (shape.experts, 2 * shape.intermediate, shape.hidden)
        w2 = (shape.experts, shape.hidden, shape.intermediate)
        return tile_of(self._kernel.try_get_optimal_moe_config(w13, w2, shape.top_k, self.dtype(), tokens))

    def using(self, tile: Tile) -> AbstractContextManager[object]:
        """vLLM's own switch for tuning."""
        context: AbstractContextManager[object] = self._package.override_config(tile.to_json())
        return context

    def forwards(self, shape: RankShape, weights: Weights, inputs: Sequence[Routed]) -> list[Forward]:
        """Experts of other ranks are mapped to -1, as vLLM does."""
        w13, w2, w13_scale, w2_scale = weights
        quantized = self._quant_config(w13_scale, w2_scale)
        placed = {"global_num_experts": shape.all_experts, "expert_map": _expert_map(shape, w13.device)}

        def forward(each: Routed) -> Forward:
            arguments = (each.hidden_states, w13, w2, each.topk_weights, each.topk_ids)
            return lambda: self._package.fused_experts(*arguments, quant_config=quantized, **placed)

        return [forward(each) for each in inputs]

    def dtype(self) -> str | None:
        """What vLLM calls INT8 W8A8 in the names of tables: None, which leaves it out."""
        import torch

        name: str | None = self._quant_config(torch.ones(1), torch.ones(1)).config_name(torch.int8)
        return name

    def _quant_config(self, w13_scale: torch.Tensor, w2_scale: torch.Tensor) -> Any:
        return self._config.int8_w8a8_moe_quant_config(
            w1_scale=w13_scale, w2_scale=w2_scale, a1_scale=None, a2_scale=None, per_act_token_quant=True
        )


class SGLangKernel:
    """SGLang's Triton kernel as ``w8a8_int8`` calls it, 0.5.23."""

    variable = "SGLANG_MOE_CONFIG_DIR"
    needs_contiguous_weights = True

    def __init__(self) -> None:
        layers = "sglang.srt.layers.moe"
        self._package = _module(f"{layers}.moe_runner.triton_utils")
        self._config = _module(f"{layers}.moe_runner.triton_utils.fused_moe_triton_config")
        self._topk = _module(f"{layers}.topk")
        self._runner = _module(f"{layers}.moe_runner")
        context = _module("sglang.srt.runtime_context")
        arguments = _module("sglang.srt.server_args").ServerArgs(model_path="dummy", device="cuda")
        context.publish(arguments, role="scheduler")  # its kernel reads settings of a server

    def version(self) -> str:
        """``sglang 0.5.23``."""
        return f"sglang {_module('sglang').__version__}"

    def table_path(self, folder: Path, shape: RankShape) -> Path:
        """``configs/triton_3_6_0/E=..,N=..,device_name=..,dtype=int8_w8a8,per_channel_quant=True.json``."""
        triton = _module("triton").__version__.replace(".", "_")
        name: str = self._config.get_config_file_name(
            shape.experts, shape.intermediate, "int8_w8a8", [0, 0], per_channel_quant=True
        )
        return folder / "configs" / f"triton_{triton}" / name

    def default(self, shape: RankShape, tokens: int) -> Tile:
        """A table that SGLang ships; else its rule of thumb."""
        w13 = (shape.experts, 2 * shape.intermediate, shape.hidden)
        w2 = (shape.experts, shape.hidden, shape.intermediate)
        found = self._config.try_get_optimal_moe_config(
            w13, w2, shape.top_k, "int8_w8a8", tokens, per_channel_quant=True
        )
        return tile_of(found)

    def using(self, tile: Tile) -> AbstractContextManager[object]:
        """SGLang's own switch for tuning."""
        context: AbstractContextManager[object] = self._package.override_config(tile.to_json())
        return context

    def forwards(self, shape: RankShape, weights: Weights, inputs: Sequence[Routed]) -> list[Forward]:
        """Experts of other ranks are -1, as SGLang's dispatcher has them."""
        w13, w2, w13_scale, w2_scale = weights
        settings = self._runner.MoeRunnerConfig(
            num_experts=shape.all_experts, num_local_experts=shape.experts, inplace=False, activation="silu"
        )

        def forward(each: Routed) -> Forward:
            ids = each.topk_ids.where(each.topk_ids < shape.experts, -1)
            routed = self._topk.StandardTopKOutput(each.topk_weights, ids, None)
            return lambda: self._package.fused_experts(
                each.hidden_states,
                w13,
                w2,
                routed,
                moe_runner_config=settings,
                use_int8_w8a8=True,
                per_channel_quant=True,
                w1_scale=w13_scale,
                w2_scale=w2_scale,
            )

        return [forward(each) for each in inputs]


ENGINES: Final[dict[str, Callable[[], Kernel]]] = {"vllm": VLLMKernel, "sglang": SGLangKernel}
"""Name -> its kernel."""
_NAMES: Final = {"vllm": "vLLM", "sglang": "SGLang"}
"""Engine, and its package -> its name for people."""


def require_engine(engine: str) -> None:
    """Refuse an environment without an engine, before anything of it is imported.

    Raises:
        UnsupportedError: the engine is not installed.
    """
    if importlib.util.find_spec(engine) is None:
        raise UnsupportedError(
            f"{_NAMES[engine]} is not installed in this environment",
            hint="run this in the environment that serves the model",
        )


def engine_kernel(engine: str) -> Kernel:
    """The kernel of an engine.

    Raises:
        UnsupportedError: the engine is not installed, or its release is unknown here.
    """
    require_engine(engine)
    return ENGINES[engine]()


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        engine = name.partition(".")[0]
        raise UnsupportedError(
            f"{_NAMES.get(engine, engine)} cannot be imported",
            expected=name,
            found=f"no module {error.name}",
            hint=f"install a release of {_NAMES.get(engine, engine)} that has it, with its dependencies",
        ) from error


def _expert_map(shape: RankShape, device: torch.device) -> torch.Tensor | None:
    """int32 [all experts]: the number of each on the first rank, -1 for those of other ranks; None for a layer."""
    import torch

    if shape.experts == shape.all_experts:
        return None
    numbers = torch.arange(shape.all_experts, dtype=torch.int32, device=device)
    return numbers.where(numbers < shape.experts, -1)
