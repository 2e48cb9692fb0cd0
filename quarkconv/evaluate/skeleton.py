"""A transformers model on the meta device, whose decoder layers are filled and emptied one by one.

The class is transformers' own; remote code never runs. Its forward runs unchanged: modules that record their arguments
replace the decoder layers. Masks, rotary embeddings, scaling of embeddings, the final norm and the head are so the
model's own code, while the layers run one at a time over all windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from quarkconv.errors import SourceError, UnsupportedError, UsageError

_OLDEST: Final = (5, 0)
"""The first release of transformers with one mapping of checkpoint names for loading."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What the model passes to a decoder layer beside the hidden states; the same for all windows of a batch size."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with, and passes its hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.call: LayerCall | None = None
        self.states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.states = LayerCall(args, kwargs), hidden_states
        return hidden_states


class _Replacement(nn.Module):
    """Stands in for the last decoder layer: returns hidden states that were computed before."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, _: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        return self.states


class Skeleton:
    """A model without its weights.

    Args:
        root: directory with config.json.
        device: where layers are filled.

    Attributes:
        model: the transformers model, ``...ForCausalLM``.
        dtype: of its floats.
        device: where layers are filled.

    Raises:
        UnsupportedError: transformers has no class for the model type, or its layers cannot be run one by one.
        UsageError: transformers is missing or too old.
    """

    def __init__(self, root: Path, device: torch.device) -> None:
        transformers = _transformers()
        self.root, self.device = root, device
        try:
            config = transformers.AutoConfig.from_pretrained(root, trust_remote_code=False)
        except Exception as error:  # transformers raises ValueError, KeyError, OSError and its own
            raise _no_class(root, error) from error
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        self.dtype: torch.dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        try:
            with torch.device("meta"):
                self.model = transformers.AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False, dtype=self.dtype
                )
        except Exception as error:
            raise _no_class(root, error) from error
        self.model.eval()
        self._layers_path, self.layers = self._find_layers()
        self._renamings, self._converters, self._mapping = self._name_mapping()
        self._meta_state = dict(self.model.state_dict().items())
        self._compute_buffers()

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def target(self, name: str) -> str:
        """The parameter of the model that a tensor of a checkpoint goes to, or becomes a part of."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(
            name, self._renamings, self._converters, self.model.base_model_prefix, self._meta_state
        )
        return str(renamed)

    def layer_of(self, parameter: str) -> int | None:
        """Number of the decoder layer that a parameter belongs to; None for the rest of the model."""
        match = re.match(rf"{re.escape(self._layers_path)}\.(\d+)\.", parameter)
        number = int(match[1]) if match else -1
        return number if 0 <= number < len(self.layers) else None

    def has(self, parameter: str) -> bool:
        """Whether the model has a parameter."""
        return parameter in self._meta_state

    def layer_prefix(self, number: int) -> str:
        """Name of a decoder layer, such as ``model.layers.3``."""
        return f"{self._layers_path}.{number}"

    def fill(self, tensors: Mapping[str, Tensor], prefix: str | None) -> None:
        """Load tensors of a checkpoint into the model, converted as transformers does when it loads.

        Args:
            tensors: name in the checkpoint -> tensor on the CPU.
            prefix: every parameter below this name has to be filled; None for every one outside of the decoder layers.

        Raises:
            SourceError: a parameter has no tensor, or one of another shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(dtype=self.dtype, device_map={"": self.device}, weight_mapping=list(self._mapping))
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
        if info.mismatched_keys or info.conversion_errors:
            name, *shapes = (sorted(info.mismatched_keys) or [(next(iter(info.conversion_errors)), "", "")])[0]
            raise SourceError(
                "A tensor does not fit the model's class",
                code="shape-unexpected",
                file=str(self.root),
                tensor=name,
                found=" and ".join(map(str, shapes)),
            )
        for name, parameter in self.model.named_parameters():
            inside = name.startswith(f"{prefix}.") if prefix is not None else self.layer_of(name) is None
            if inside and parameter.is_meta and not self._tied(name):
                raise SourceError(
                    "The checkpoint has no tensor for a parameter of the model",
                    code="tensor-missing",
                    file=str(self.root),
                    tensor=name,
                    hint="run `quarkconv inspect`",
                )

    def empty(self, number: int) -> None:
        """Free the parameters of a decoder layer."""
        layer = self.layers[number]
        for module in layer.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def embed(self, ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Hidden states before the first layer, [B, L, H], and what each layer is called with.

        Args:
            ids: int64 [B, L].

        Raises:
            UnsupportedError: the model passes something between its layers that depends on them.
        """
        recorders = [_Recorder() for _ in self.layers]
        with self._replaced(recorders), torch.no_grad():
            self.model.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        first = recorders[0].states
        if first is None or any(item.states is None or item.states is not first for item in recorders):
            raise UnsupportedError(
                "The layers of this model cannot be run one by one",
                file=str(self.root),
                expected="a decoder whose layers take the hidden states of the layer before",
                found=type(self.model).__name__,
            )
        return first, [item.call for item in recorders if item.call is not None]

    def run_layer(self, number: int, states: Tensor, call: LayerCall) -> Tensor:
        """One decoder layer, filled before: [B, L, H] -> [B, L, H]."""
        with torch.no_grad():
            result = self.layers[number](states, *call.args, **call.kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def logits(self, ids: Tensor, states: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last layer, [B, n, V], at some positions of each window.

        Args:
            ids: int64 [B, L].
            states: hidden states after the last layer, [B, L, H].
            positions: int64 [n].
        """
        replaced: list[nn.Module] = [_Recorder() for _ in self.layers]
        replaced[-1] = _Replacement(states.to(self.device))
        with self._replaced(replaced), torch.no_grad():
            output = self.model(
                input_ids=ids.to(self.device), use_cache=False, logits_to_keep=positions.to(self.device)
            )
        logits: Tensor = output.logits
        return logits

    def module(self, path: str) -> nn.Module:
        """A module by its path.

        Raises:
            KeyError: the model has no such module.
        """
        try:
            module: nn.Module = self.model.get_submodule(path)
        except AttributeError as error:
            raise KeyError(path) from error
        return module

    def experts_of(self, number: int) -> tuple[str, nn.Module] | None:
        """Path and module of the routed experts of a decoder layer; None where it has none."""
        prefix = self.layer_prefix(number)
        for name, module in self.layers[number].named_modules():
            if hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):  # set by use_experts_implementation
                return f"{prefix}.{name}", module
        return None

    @contextmanager
    def _replaced(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        owner, leaf = self._owner(self._layers_path)
        before = getattr(owner, leaf)
        setattr(owner, leaf, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(owner, leaf, before)

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        head, _, leaf = path.rpartition(".")
        return (self.model.get_submodule(head) if head else self.model), leaf

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        names = {id(module): name for name, module in self.model.named_modules()}
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise UnsupportedError(
                "The decoder of this model has no list of layers", file=str(self.root), found=type(decoder).__name__
            )
        return names[id(layers)], layers

    def _name_mapping(self) -> tuple[list[Any], list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(self.model)
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        return renamings, [item for item in mapping if isinstance(item, WeightConverter)], mapping

    def _compute_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds, such as rotary frequencies, as transformers does."""
        for name, module in self.model.named_modules():
            names = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
            if not names:
                continue
            for key in names:
                buffer = module._buffers[key]
                assert buffer is not None
                fill = float("nan") if buffer.is_floating_point() else 0
                module._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=self.device)
            if name not in ("",) and any(f"{name}.{key}" in self._meta_state for key in names):
                continue  # a buffer that checkpoints hold
            with torch.no_grad():
                self.model._init_weights(module)
            for key in names:
                buffer = module._buffers[key]
                if buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any()):
                    raise UnsupportedError(
                        "A buffer of this model cannot be computed without its weights",
                        file=str(self.root),
                        tensor=f"{name}.{key}",
                    )

    def _tied(self, name: str) -> bool:
        """Whether a parameter shares its data with another one that is filled."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if name not in tied:
            return False
        source = self.model.get_parameter(tied[name])
        if source.is_meta:
            return False
        owner, leaf = self._owner(name)
        owner._parameters[leaf] = source
        return True


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError("evaluate needs transformers", hint="pip install 'transformers>=5' tokenizers") from error
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if version < _OLDEST:
        raise UsageError(
            "transformers is too old", expected="5.0 or later", found=transformers.__version__,
            hint="pip install -U transformers",
        )  # fmt: skip
    return transformers


def _no_class(root: Path, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "transformers has no class for this model",
        file=str(root / "config.json"),
        found=str(error).splitlines()[0][:200],
        hint="quarkconv never runs code of a checkpoint; `quarkconv verify` checks each layer without a class",
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for each call that loads weights."""
    from transformers.utils import logging

    bars: Any = logging  # its functions are typed in some releases only
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
