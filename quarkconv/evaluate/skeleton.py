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
_AUTO_CLASSES: Final = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""Where a class with a head is looked for; models of text and images have one of the second only."""
_LAYERS: Final = ("layers", "blocks")
"""Names of the list of decoder layers."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What the model passes to a decoder layer beside the hidden states; the same for all windows of a batch size."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Replacement(nn.Module):
    """Replaces a decoder layer; has the layer's attributes, which the model may read (``block_type``)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._replaced = (layer,)  # in a tuple: not a module of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)


class _Recorder(_Replacement):
    """Keeps what it is called with, and passes its hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.call: LayerCall | None = None
        self.states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.states = LayerCall(args, kwargs), hidden_states
        return hidden_states


class _Computed(_Replacement):
    """Returns hidden states that were computed before."""

    def __init__(self, layer: nn.Module, states: Tensor) -> None:
        super().__init__(layer)
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
        unmatched: tensors of the checkpoint that are not parameters of the model.
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
        known = [item for item in _AUTO_CLASSES if type(config) in getattr(transformers, item)._model_mapping]
        auto = getattr(transformers, (known or _AUTO_CLASSES)[0])
        try:
            with torch.device("meta"):
                self.model = auto.from_config(config, trust_remote_code=False, dtype=self.dtype)
        except Exception as error:
            raise _no_class(root, error) from error
        self.model.eval()
        self._layers_path, self.layers = self._find_layers()
        self._renamings, self._converters, self._mapping = self._name_mapping()
        self.unmatched: list[str] = []
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
        target = str(renamed)
        # A mapping of published names may also hit names that are the model's own already.
        return name if name in self._meta_state and target not in self._meta_state else target

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

        own = {name for name in tensors if self.has(name) and self.target(name) == name}
        config = LoadStateDictConfig(dtype=self.dtype, device_map={"": self.device}, weight_mapping=list(self._mapping))
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config)
        for name in own:
            self._set(name, tensors[name])
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
                leaf = ".".join(name.split(".")[-2:])
                if other := next((item for item in self.unmatched if item.endswith(leaf) or ".experts." in item), None):
                    raise UnsupportedError(
                        "The model's class in transformers does not load tensors of these names",
                        file=str(self.root),
                        tensor=other,
                        expected=name,
                    )
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
        recorders = [_Recorder(layer) for layer in self.layers]
        with self._replaced(recorders), self._forward():
            self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=1)
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
        with self._forward():
            result = self.layers[number](states, *call.args, **call.kwargs)
        if isinstance(result, tuple):
            raise UnsupportedError(
                "The layers of this model pass more than hidden states to one another",
                file=str(self.root),
                tensor=self.layer_prefix(number),
                found=type(self.layers[number]).__name__,
            )
        output: Tensor = result
        return output

    def logits(self, ids: Tensor, states: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last layer, [B, n, V], at some positions of each window.

        Args:
            ids: int64 [B, L].
            states: hidden states after the last layer, [B, L, H].
            positions: int64 [n].
        """
        replaced: list[nn.Module] = [_Recorder(layer) for layer in self.layers]
        replaced[-1] = _Computed(self.layers[-1], states.to(self.device))
        with self._replaced(replaced), self._forward():
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

    def experts_of(self, number: int) -> dict[str, nn.Module]:
        """Path -> module of the routed experts of a decoder layer; empty in dense layers."""
        prefix = self.layer_prefix(number)
        return {
            f"{prefix}.{name}": module
            for name, module in self.layers[number].named_modules()
            if hasattr(module, "is_concatenated") and hasattr(module, "has_gate")  # set by use_experts_implementation
        }

    def _set(self, name: str, tensor: Tensor) -> None:
        """Fill a parameter or buffer that the loader of transformers left out, for all that it renames the tensor."""
        owner, leaf = self._owner(name)
        held = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if held is not None and held.is_meta and held.shape == tensor.shape:
            filled = tensor.to(self.device, held.dtype)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
            else:
                owner._buffers[leaf] = filled

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Code of the model's class: without gradients, and its exceptions as errors of ours."""
        try:
            with torch.no_grad():
                yield
        except torch.OutOfMemoryError as error:
            raise UsageError(
                "The device's memory is too small for a batch", found=str(self.device), hint="give a smaller --batch"
            ) from error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(
                "The model's class in transformers cannot be run layer by layer",
                file=str(self.root),
                found=f"{type(self.model).__name__}: {error}"[:200],
            ) from error

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
        layers = next((found for leaf in _LAYERS if (found := getattr(decoder, leaf, None)) is not None), None)
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
            "transformers is too old",
            expected="5.0 or later",
            found=transformers.__version__,
            hint="pip install -U transformers",
        )
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
