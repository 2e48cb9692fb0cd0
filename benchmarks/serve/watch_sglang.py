"""A scheduler of SGLang's that records what its layers of routed experts hold, take and give for one prompt.

It runs in SGLang's own process of that name; nothing of SGLang is replaced, functions are wrapped. What it finds is in
the file that ``RECORD`` names: for each layer its method, parameters, tokens, weights, ids and output, and the dtypes
that reached SGLang's Triton kernel and its product of int8 linears.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

RECORD: Final = "QUARKCONV_SERVE_RECORD"
"""Environment variable with the file to write."""
TOKENS: Final = "QUARKCONV_SERVE_TOKENS"
"""Environment variable with the length of the prompt."""

_QUANTIZED: Final = ("use_int8_w8a8", "use_int8_w8a16", "per_channel_quant")
"""Arguments of SGLang's kernel that say what it makes of the operands: it quantizes activations itself."""


class Record:
    """What was seen; written to the file whenever a layer is seen for the first time."""

    def __init__(self) -> None:
        self.path = Path(os.environ[RECORD])
        self.tokens = int(os.environ[TOKENS])
        self.layers: dict[str, dict[str, Any]] = {}
        self.kernel: Counter[str] = Counter()
        self.linear: Counter[str] = Counter()

    def save(self) -> None:
        """Write what was seen so far."""
        found = {"layers": self.layers, "kernel": dict(self.kernel), "linear": dict(self.linear)}
        partial = self.path.with_suffix(".partial")
        torch.save(found, partial)
        partial.replace(self.path)

    def wrap_products(self) -> None:
        """Look at the operands of SGLang's kernel for experts and of its int8 linears from now on."""
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
        from sglang.srt.layers.quantization import w8a8_int8

        for module, name, seen in (
            (fused_moe, "invoke_fused_moe_kernel", self.kernel),
            (w8a8_int8, "int8_scaled_mm", self.linear),
        ):
            vars(module)[name] = _counted(vars(module)[name], seen)

    def wrap_loader(self) -> None:
        """Look at each layer of routed experts of the model that SGLang's loader gives."""
        from sglang.srt.model_loader.loader import DefaultModelLoader

        load = DefaultModelLoader.load_model

        def wrapped(loader: Any, **kwargs: Any) -> torch.nn.Module:
            model: torch.nn.Module = load(loader, **kwargs)
            for name, module in model.named_modules():
                if hasattr(module, "w13_weight"):
                    self._wrap_layer(name, module)
            self.save()
            return model

        DefaultModelLoader.load_model = wrapped

    def _wrap_layer(self, name: str, layer: Any) -> None:
        held = {key: value.detach().cpu() for key, value in layer.named_parameters() if value is not None}
        self.layers[name] = {
            "method": type(layer.quant_method).__name__,
            "shared_slots": getattr(layer, "num_fused_shared_experts", 0),
            "factor": layer.moe_runner_config.routed_scaling_factor or 1.0,
            "parameters": held,
        }
        apply = layer.quant_method.apply

        def wrapped(layer: Any, dispatch_output: Any, **kwargs: Any) -> Any:
            topk = dispatch_output.topk_output
            given = [
                dispatch_output.hidden_states,
                getattr(topk, "topk_weights", None),
                getattr(topk, "topk_ids", None),
            ]
            copies = [None if value is None else value.clone().cpu() for value in given]
            out = apply(layer=layer, dispatch_output=dispatch_output, **kwargs)
            if len(given[0]) == self.tokens and "call" not in self.layers[name]:
                self.layers[name]["call"] = (*copies, out.hidden_states.clone().cpu())
                self.save()
            return out

        layer.quant_method.apply = wrapped


def _counted(function: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def wrapped(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        flags = [name for name in _QUANTIZED if kwargs.get(name)]
        seen[" ".join([f"{a.dtype} x {b.dtype}".replace("torch.", ""), *flags])] += 1
        return function(a, b, *args, **kwargs)

    return wrapped


def watched_scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's ``run_scheduler_process``, watched."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    record = Record()
    record.wrap_products()
    record.wrap_loader()
    return run_scheduler_process(*args, **kwargs)
