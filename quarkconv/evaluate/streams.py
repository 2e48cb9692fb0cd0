"""Hidden states of several variants of a model, carried through its decoder layers one layer at a time.

All windows go through a layer before the next one runs, so each layer is read once, and two are in memory: the one
that runs and the one that is read, and filled, ahead. The variants are

    unquantized    the model before quantization
    dequantized    codes times scales, activations not rounded
    int8           codes as they are, activations rounded to 8 bits

and ablations, ``int8`` with one layer or one expert of the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from quarkconv.errors import SourceError, UsageError
from quarkconv.evaluate.dequantize import CodeWeights
from quarkconv.evaluate.expert_classes import ROUTED, expert_count
from quarkconv.evaluate.forward import LayerCall, embed, run_layer
from quarkconv.evaluate.hidden_states import LayerOutput
from quarkconv.evaluate.int8 import ExpertLeftOut, Int8Experts
from quarkconv.evaluate.int8_layer import in_place, int8_modules
from quarkconv.evaluate.memory import batch_tokens, layers_bytes, states_bytes
from quarkconv.evaluate.parameters import empty, fill
from quarkconv.evaluate.routed import Routed, counts, sample_experts
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.sums import DeviceSums, LayerSums, compared
from quarkconv.evaluate.weights import CheckpointWeights, LayerWeights
from quarkconv.load.layer_reads import LayerPart

UNQUANTIZED: Final = "unquantized"
DEQUANTIZED: Final = "dequantized"
INT8: Final = "int8"


@dataclass(slots=True)
class Model:
    """A model whose layers are filled one by one: its skeleton and its weights."""

    skeleton: Skeleton
    weights: CheckpointWeights


class _Filled(NamedTuple):
    """A filled layer of the evaluated model: names of its MoE layers, and path -> module that computes in INT8."""

    moe: list[str]
    modules: dict[str, nn.Module]


class LayerRunner:
    """Runs one device's share of the windows through the layers.

    Args:
        quantized: the model that is evaluated, on the device.
        unquantized: the model before quantization, on the device, if any.
        int8_layers: decoder layers that run in INT8; None for all INT8 layers.
    """

    def __init__(self, quantized: Model, unquantized: Model | None, int8_layers: frozenset[int] | None) -> None:
        self.quantized, self.unquantized = quantized, unquantized
        self._int8_layers = int8_layers
        self._filled: dict[int, _Filled] = {}
        self._config = quantized.weights.description.checkpoint.config

    @property
    def device(self) -> torch.device:
        """Where layers run."""
        return self.quantized.skeleton.device

    @property
    def baseline(self) -> Model:
        """The model that INT8 is compared with."""
        return self.unquantized or self.quantized

    @property
    def base_name(self) -> str:
        """The variant that INT8 is compared with."""
        return DEQUANTIZED if self.unquantized is None else UNQUANTIZED

    def model_of(self, variant: str) -> Model:
        """The model whose norm and head a variant takes."""
        return self.baseline if variant == self.base_name else self.quantized

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, where the caller does not say."""
        skeleton, config = self.quantized.skeleton, self.quantized.weights.description.config
        return batch_tokens(skeleton.device, skeleton.hidden, config.top_k or 1)

    def states_bytes(self, copies: int) -> int:
        """Bytes of hidden states that stay on the device, of which there are so many copies; 0 on a CPU."""
        skeleton = self.quantized.skeleton
        if skeleton.device.type != "cuda":
            return 0
        sizes = [(LayerPart(layer).nbytes, layer.experts) for layer in self.quantized.weights.description.moe_layers]
        elements, experts = max(sizes, default=(0, 1))
        part = 1 if skeleton.group is None else skeleton.group / experts
        return states_bytes(skeleton.device, layers_bytes(elements, self.unquantized is not None, part), copies)

    def embed(self, ids: Tensor) -> tuple[Tensor, list[LayerCall], list[LayerCall]]:
        """Hidden states [B, L, H] before the first layer, and the calls of the layers of both models."""
        states, calls = embed(self.quantized.skeleton, ids)
        if self.unquantized is None:
            return states, calls, calls
        own, baseline_calls = embed(self.unquantized.skeleton, ids)
        if not torch.equal(states, own):
            # Embeddings are not quantized: another tokenizer or another model.
            raise UsageError(
                "The embeddings of the two models differ",
                file=str(self.unquantized.skeleton.root),
                expected="the model that was quantized",
                hint="give --unquantized the model before it was quantized",
            )
        return states, calls, baseline_calls

    @property
    def fills_ahead(self) -> bool:
        """Whether a layer may be filled while the one before runs: both are whole on a GPU."""
        skeleton = self.quantized.skeleton
        return skeleton.device.type == "cuda" and skeleton.group is None

    @property
    def models(self) -> list[Model]:
        """The evaluated model, and the one before quantization if there is one."""
        return [self.quantized, *([] if self.unquantized is None else [self.unquantized])]

    def fill(self, number: int, weights: LayerWeights) -> None:
        """Fill a layer of the evaluated model."""
        skeleton = self.quantized.skeleton
        weights = weights.on(skeleton.device)
        fill(skeleton, weights.floats, skeleton.layer_prefix(number), weights.divided)
        for path in weights.divided:
            skeleton.divided[path].weights = CodeWeights(weights.experts[path][1], skeleton.module(path))
        in_int8 = self._int8_layers is None or number in self._int8_layers
        modules = dict(int8_modules(skeleton, number, weights, self._config)) if in_int8 else {}
        self._filled[number] = _Filled([layer.moe for layer, _ in weights.experts.values()], modules)

    def fill_unquantized(self, number: int, weights: LayerWeights) -> None:
        """Fill a layer of the model before quantization."""
        assert self.unquantized is not None
        skeleton = self.unquantized.skeleton
        fill(skeleton, weights.on(skeleton.device).floats, skeleton.layer_prefix(number))

    def empty(self, number: int) -> None:
        """Free a layer of both models."""
        del self._filled[number]
        empty(self.quantized.skeleton, number)
        if self.unquantized is not None:
            empty(self.unquantized.skeleton, number)

    def step(
        self,
        number: int,
        states: Mapping[str, LayerOutput],
        calls: tuple[LayerCall, LayerCall],
        *,
        ablated: Mapping[str, int | None] = MappingProxyType({}),
        sample: bool = False,
        record: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, LayerOutput], DeviceSums]:
        """One layer for one batch. Nothing waits for the device.

        Args:
            number: the layer.
            states: variant -> output of the layer before, on the device.
            calls: of the evaluated model's layer, and of the baseline's.
            ablated: variant -> the expert that takes the baseline's weights in this layer; None for the whole layer.
            sample: also compute the errors of single experts.
            record: MoE layer -> where the inputs [M, H] of its routed experts in the baseline go.

        Returns:
            variant -> output of the layer, on the device, and the sums of this batch.
        """
        skeleton = self.quantized.skeleton
        base_name = self.base_name
        moe, modules = self._filled[number]
        after: dict[str, LayerOutput] = {}
        sums = DeviceSums()

        def run(model: Skeleton, name: str) -> LayerOutput:
            return run_layer(model, number, states[name].states, calls[model is not skeleton], states[name].handed_on)

        base_routed: Routed | None = None
        if base_name in states:
            with self._tap(self.baseline, number) as routed:
                after[base_name] = run(self.baseline.skeleton, base_name)
            base_routed = routed[-1] if routed else None
            if record is not None and base_routed is not None:
                record |= {name: base_routed.states.cpu().contiguous() for name in moe}
            if sample and base_routed is not None:
                sample_experts(modules, base_routed, sums)
        if DEQUANTIZED in states and base_name != DEQUANTIZED:
            after[DEQUANTIZED] = run(skeleton, DEQUANTIZED)
        for name in states.keys() - after.keys() - {INT8}:
            if name in ablated and ablated[name] is None:
                after[name] = run(self.baseline.skeleton, name)
                continue
            with in_place(skeleton, self._without(number, ablated.get(name))):
                after[name] = run(skeleton, name)
        if INT8 in states:
            with in_place(skeleton, modules):
                with self._tap(self.quantized, number) as routed:
                    after[INT8] = run(skeleton, INT8)
                if base_name in states:
                    base = after[base_name].states
                    self._compare(sums, after[INT8].states, base, routed[-1] if routed else None, base_routed)
                    own_difference, _, own_norm = compared(run(skeleton, base_name).states, base)
                    sums.add(own_difference=own_difference, own_norm=own_norm)
        for name, item in after.items():
            sums.check(name, item.states)
        return after, sums

    def finish(self, number: int, sums: DeviceSums) -> LayerSums:
        """The sums of a batch, once the device has computed them.

        Raises:
            SourceError: hidden states are not finite after this layer.
        """
        found, infinite = sums.take()
        if infinite:
            model = self.baseline if infinite[0] == self.base_name else self.quantized
            in_int8 = bool(model.weights.description.schemes)
            raise SourceError(
                "Hidden states are not finite",
                code="states-not-finite",
                file=str(model.skeleton.root),
                tensor=self.quantized.skeleton.layer_prefix(number),
                found=f"NaN or infinity in the {infinite[0]} model; the layers before are finite",
                hint=f"run `quarkconv verify {model.skeleton.root} --layers {number}`"
                if in_int8
                else "download the checkpoint again",
            )
        return found

    def _without(self, number: int, expert: int | None) -> dict[str, nn.Module]:
        """The INT8 modules of a layer; one routed expert, if any is named, computes as in the baseline."""
        modules = self._filled[number].modules
        if expert is None:
            return modules
        floats = self.baseline.skeleton.experts_of(number)
        return {
            path: ExpertLeftOut(module, floats[path], expert) if isinstance(module, Int8Experts) else module
            for path, module in modules.items()
        }

    def _compare(
        self,
        sums: DeviceSums,
        int8: Tensor,
        base: Tensor,
        routed: Routed | None,
        base_routed: Routed | None,
    ) -> None:
        difference, norm, baseline_norm = compared(int8, base)
        sums.add(difference=difference, norm=norm, baseline_norm=baseline_norm)
        sums.tokens = base.shape[:2].numel()
        if routed is None or base_routed is None:
            return
        same = routed.ids.sort(-1).values == base_routed.ids.sort(-1).values
        module = routed.experts  # of the class where the experts, or this layer, do not run in INT8
        experts = module.experts.experts if isinstance(module, Int8Experts) else expert_count(module)
        sums.add(changed=(~same.all(-1)).sum())
        if experts:
            sums.add(load=counts(routed.ids, experts))

    @contextmanager
    def _tap(self, model: Model, number: int) -> Iterator[list[Routed]]:
        """Collect what the routed experts of a layer are called with."""
        found: list[Routed] = []
        prefix = model.skeleton.layer_prefix(number)
        experts = model.skeleton.experts_of(number)
        replaced = [module for path, module in self._filled[number].modules.items() if path.startswith(f"{prefix}.")]
        modules: list[nn.Module] = [module for module in replaced if isinstance(module, Int8Experts)]
        modules += experts.values()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = dict(zip(ROUTED, args, strict=False)) | kwargs
            states, ids, weights = (values.get(key) for key in ROUTED)
            if isinstance(states, Tensor) and isinstance(ids, Tensor) and isinstance(weights, Tensor):
                tokens = states.reshape(-1, states.shape[-1])
                found.append(Routed(module, tokens, ids.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)))

        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
