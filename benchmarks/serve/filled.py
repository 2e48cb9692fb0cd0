"""A loader of vLLM's (``load_format="filled"``) that fills parameters with values that depend on their names only.

Every backend then computes with the same weights, whatever it repacks them to. They are random, since kernels run
faster on zeros, and scaled so that activations keep their size from layer to layer.

Models of several processes fit into one GPU where they share their parameters: see `share`. A model that is too large
fits where later layers repeat the experts of the first ones: see `Repeated`.
"""

from __future__ import annotations

import math
import os
import pickle
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LOAD_FORMAT = "filled"
TURN = "FILLED_TURN"
"""Environment variable: a file. A model is built once it exists, since building takes more memory than the model."""
SHARED = "FILLED_SHARED"
"""Environment variable: a file by which models of the same layouts share their parameters; unset, they share none."""
DISTINCT = "FILLED_DISTINCT"
"""Environment variable: so many layers have experts of their own, which later layers repeat; unset, all have."""
_LEAST_SHARED = 1 << 20  # bytes
_LEAST_REPEATED = 1 << 20  # bytes; larger int8 tensors with three dimensions are those of all experts of a layer
_DEVIATION = 73.6  # of uniform codes in -127..127
_LOGITS = 3.0  # deviation of the logits, so that log-probabilities differ from token to token


def register() -> None:
    """Register the loader; an entry point of ``vllm.general_plugins``."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class FilledLoader(BaseModelLoader):  # type: ignore[misc]
        def download_model(self, model_config: Any) -> None:
            pass

        def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
            while TURN in os.environ and not Path(os.environ[TURN]).exists():
                time.sleep(0.05)
            loaded: torch.nn.Module = super().load_model(*args, **kwargs)
            return loaded

        def create_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
            with Repeated(distinct()):
                created: torch.nn.Module = super().create_model(*args, **kwargs)
            return created

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            repeat_processed(model, distinct())
            path = Path(os.environ[SHARED]) if SHARED in os.environ else None
            if path is None or not path.exists():
                fill(model)
            if path is not None:
                share(model, path)

    register_model_loader(LOAD_FORMAT)(FilledLoader)


def distinct() -> int | None:
    """The value of `DISTINCT`."""
    return int(os.environ[DISTINCT]) if DISTINCT in os.environ else None


class Repeated(TorchFunctionMode):
    """While a model is created: the weights of experts of layer n are the memory of those of layer n modulo `distinct`.

    Timings stay those of a model with as many experts as layers, as long as the experts that a token chooses in
    `distinct` layers do not fit into the L2 cache.
    """

    def __init__(self, distinct: int | None) -> None:
        super().__init__()
        self.distinct = distinct
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._first: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of a function; torch.empty gives the experts of a later layer the memory of an earlier one."""
        kwargs = kwargs or {}
        shape = tuple(args[0] if args and not isinstance(args[0], int) else args) if function is torch.empty else ()
        large = len(shape) == 3 and kwargs.get("dtype") == torch.int8 and math.prod(shape) >= _LEAST_REPEATED
        if self.distinct is None or not large:
            return function(*args, **kwargs)
        first = self._first.setdefault(shape, [])
        number = self._counts[shape] % self.distinct
        self._counts[shape] += 1
        if number == len(first):
            first.append(function(*args, **kwargs))
        return first[number].detach()


def repeat_processed(model: torch.nn.Module, distinct: int | None) -> None:
    """Have layers of `Repeated` repeat the experts as a backend repacks them, too, as soon as each is repacked."""
    layers = [layer for layer in model.modules() if "w13_weight" in dict(layer.named_parameters(recurse=False))]

    def repeat(layer: Any, earlier: Any) -> None:
        process = layer.quant_method.process_weights_after_loading

        def processed(layer: Any) -> None:
            process(layer)
            for name in ("w13_weight", "w2_weight"):
                getattr(layer, name).data = getattr(earlier, name).data

        layer.quant_method.process_weights_after_loading = processed

    for number, layer in enumerate(layers):
        if distinct is not None and number >= distinct:
            repeat(layer, layers[number % distinct])


def fill(model: torch.nn.Module, below: int | None = None) -> None:
    """Fill every parameter of a model that vLLM has built and not processed yet, or those below so many bytes."""
    filled = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if (below is not None and parameter.nbytes >= below) or parameter.data_ptr() in filled:
                continue
            filled.add(parameter.data_ptr())
            random = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{prefix}.{name}".encode()))
            weight = own.get(name.removesuffix("_scale"))
            if parameter.dtype == torch.int8:
                parameter.data.random_(-127, 128, generator=random)
            elif name.endswith("_scale") and weight is not None:
                parameter.data.uniform_(0.5, 1.5, generator=random).div_(_DEVIATION * weight.shape[-1] ** 0.5)
            elif "norm" in prefix.rpartition(".")[2]:
                parameter.data.fill_(1)
            elif "bias" in name:
                parameter.data.normal_(0, 0.01, generator=random)
            elif "embed" in prefix:
                parameter.data.normal_(0, 1, generator=random)
            else:
                gain = _LOGITS if "lm_head" in prefix else 1.0
                parameter.data.normal_(0, gain / parameter.shape[-1] ** 0.5, generator=random)


def share(model: torch.nn.Module, path: Path) -> None:
    """Let models of several processes have the same memory, through CUDA's handles for other processes.

    The first model writes its handles to `path`, and must outlive the others. Those replace their large parameters with
    its ones, and fill the others. No process may write to a parameter after that.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    large = {name: each for name, each in model.named_parameters() if each.nbytes >= _LEAST_SHARED}
    if not path.exists():
        torch.cuda.synchronize()
        handles = {name: reduce_tensor(each.data) for name, each in large.items()}
        scratch = path.with_suffix(".part")
        scratch.write_bytes(pickle.dumps(handles))
        scratch.rename(path)
        return
    for name, (rebuild, arguments) in pickle.loads(path.read_bytes()).items():
        tensor = rebuild(*arguments)
        parameter = large.pop(name)
        if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(f"{name}: expected {tensor.dtype} {list(tensor.shape)}, found {parameter.shape}")
        parameter.data = tensor
    if large:
        raise ValueError(f"not shared: {', '.join(large)}")
    fill(model, _LEAST_SHARED)


def write_entry_point(folder: Path) -> Path:
    """Metadata in `folder` by which vLLM finds the loader, if folder and this file's are on PYTHONPATH."""
    info = folder / "quarkconv_serve-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quarkconv-serve\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nquarkconv_serve = filled:register\n")
    return folder
