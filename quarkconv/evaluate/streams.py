"""Hidden states of several variants of a model, carried through its decoder layers one layer at a time.

All windows go through a layer before the next one is read, so each layer is read once, and two are in memory: the one
that runs and the one that is read ahead. The variants are

    unquantized    the model before quantization
    dequantized    codes times scales, activations not rounded
    int8           codes as they are, activations rounded to 8 bits

and an ablation, ``int8`` with one layer of the baseline's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.evaluate.int8 import Int8Experts, Int8Linear
from quarkconv.evaluate.skeleton import LayerCall, Skeleton
from quarkconv.evaluate.weights import CheckpointWeights, Int8Weight, LayerWeights, dequantized
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import expert_activation

UNQUANTIZED: Final = "unquantized"
DEQUANTIZED: Final = "dequantized"
INT8: Final = "int8"
SAMPLE_TOKENS: Final = 1024
"""Tokens of which each expert's error is computed."""


@dataclass(slots=True)
class Model:
    """A model whose layers are filled one by one: its skeleton and its weights."""

    skeleton: Skeleton
    weights: CheckpointWeights


@dataclass(slots=True)
class Routed:
    """Routed experts of a layer, and what they were called with: hidden states [M, H], ids and weights [M, k]."""

    experts: nn.Module
    states: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(slots=True)
class LayerSums:
    """Sums over tokens of one layer; those of several devices are added."""

    difference: float = 0.0
    norm: float = 0.0
    baseline_norm: float = 0.0
    product: float = 0.0
    own_difference: float = 0.0
    own_norm: float = 0.0
    tokens: int = 0
    changed: int = 0
    routed: bool = False
    load: Tensor | None = None
    expert_errors: Tensor | None = None
    expert_tokens: Tensor | None = None
    expert_norm: float = 0.0

    def add(self, other: LayerSums) -> None:
        """Add the sums of other tokens."""
        for name in (
            "difference",
            "norm",
            "baseline_norm",
            "product",
            "own_difference",
            "own_norm",
            "tokens",
            "changed",
            "expert_norm",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.routed = self.routed or other.routed
        for name in ("load", "expert_errors", "expert_tokens"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs if mine is None else mine if theirs is None else mine + theirs)


@dataclass(slots=True)
class Streams:
    """Hidden states of each variant, [W, L, H] on the CPU, after ``finished`` layers."""

    states: dict[str, Tensor]
    finished: int = 0
    sums: list[LayerSums] = field(default_factory=list)


class LayerRunner:
    """Runs one device's share of the windows through the layers.

    Args:
        quantized: the model that is evaluated, on the device.
        unquantized: the model before quantization, on the device, if any.
        int8_layers: decoder layers that run in INT8; None for all that are stored so.
    """

    def __init__(self, quantized: Model, unquantized: Model | None, int8_layers: frozenset[int] | None) -> None:
        self.quantized, self.unquantized = quantized, unquantized
        self._int8_layers = int8_layers
        self._config = quantized.weights.description.checkpoint.config

    @property
    def baseline(self) -> Model:
        """The model that INT8 is compared with."""
        return self.unquantized or self.quantized

    def embed(self, ids: Tensor) -> tuple[Tensor, list[LayerCall], list[LayerCall]]:
        """Hidden states [B, L, H] before the first layer, and the calls of the layers of both models."""
        states, calls = self.quantized.skeleton.embed(ids)
        if self.unquantized is None:
            return states, calls, calls
        own, baseline_calls = self.unquantized.skeleton.embed(ids)
        if not torch.equal(states, own):
            # Embeddings are not quantized: another tokenizer or another model.
            raise UnsupportedError(
                "The embeddings of the two models differ",
                file=str(self.unquantized.skeleton.root),
                expected="the model that was quantized",
                hint="give --unquantized the model before it was quantized",
            )
        return states, calls, baseline_calls

    def fill(self, number: int, quantized: LayerWeights, unquantized: LayerWeights | None) -> None:
        """Fill a layer of both models."""
        skeleton = self.quantized.skeleton
        quantized = quantized.on(skeleton.device)
        skeleton.fill(quantized.floats, skeleton.layer_prefix(number))
        if self.unquantized is not None and unquantized is not None:
            other = self.unquantized.skeleton
            other.fill(unquantized.on(other.device).floats, other.layer_prefix(number))
        self._moe = quantized.experts
        self._modules = dict(self._int8_modules(number, quantized))

    def empty(self, number: int) -> None:
        """Free a layer of both models."""
        self._modules = {}
        self.quantized.skeleton.empty(number)
        if self.unquantized is not None:
            self.unquantized.skeleton.empty(number)

    def step(
        self,
        number: int,
        states: Mapping[str, Tensor],
        calls: tuple[LayerCall, LayerCall],
        *,
        ablated: Sequence[str] = (),
        sample: bool = False,
        record: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], LayerSums]:
        """One layer for one batch.

        Args:
            number: the layer.
            states: variant -> hidden states [B, L, H] before the layer.
            calls: of the evaluated model's layer, and of the baseline's.
            ablated: variants that take the baseline's weights in this layer.
            sample: also compute the errors of single experts.
            record: MoE layer -> where the inputs [M, H] of its routed experts in the baseline go.

        Returns:
            variant -> hidden states after the layer, and the sums of this batch.
        """
        device = self.quantized.skeleton.device
        given = {name: tensor.to(device) for name, tensor in states.items()}
        base_name = UNQUANTIZED if self.unquantized is not None else DEQUANTIZED
        after: dict[str, Tensor] = {}
        sums = LayerSums()
        base_routed: Routed | None = None
        if base_name in given:
            with self._tap(self.baseline, number) as routed:
                after[base_name] = self.baseline.skeleton.run_layer(number, given[base_name], calls[1])
            base_routed = routed[-1] if routed else None
            if record is not None and base_routed is not None:
                record |= {layer.moe: base_routed.states.cpu().contiguous() for layer, _ in self._moe.values()}
            if sample and base_routed is not None:
                self._sample_experts(base_routed, sums)
        if DEQUANTIZED in given and base_name != DEQUANTIZED:
            after[DEQUANTIZED] = self.quantized.skeleton.run_layer(number, given[DEQUANTIZED], calls[0])
        in_int8 = [name for name in given if name not in (UNQUANTIZED, DEQUANTIZED)]
        for name in in_int8:
            if name in ablated:
                after[name] = self.baseline.skeleton.run_layer(number, given[name], calls[1])
        with self._int8(number):
            for name in in_int8:
                if name in ablated:
                    continue
                with self._tap(self.quantized, number) as routed:
                    after[name] = self.quantized.skeleton.run_layer(number, given[name], calls[0])
                if name == INT8 and base_name in given:
                    self._compare(sums, after[INT8], after[base_name], routed[-1] if routed else None, base_routed)
            if INT8 in given and base_name in given:
                own = self.quantized.skeleton.run_layer(number, given[base_name], calls[0])
                sums.own_difference += _squares(own.double() - after[base_name].double())
                sums.own_norm += _squares(after[base_name].double())
        for name, tensor in after.items():
            if not bool(tensor.isfinite().all()):
                raise SourceError(
                    "Hidden states are not finite",
                    code="states-not-finite",
                    file=str(self.quantized.skeleton.root),
                    tensor=self.quantized.skeleton.layer_prefix(number),
                    found=f"NaN or infinity in the {name} model; the layers before are finite",
                    hint=f"run `quarkconv verify --layers {number}`",
                )
        return {name: tensor.cpu() for name, tensor in after.items()}, sums

    def _sample_experts(self, routed: Routed, sums: LayerSums) -> None:
        """Add the errors of single experts on the first tokens that the baseline routed."""
        mine = next((module for module in self._modules.values() if isinstance(module, Int8Experts)), None)
        if mine is None:
            return
        hidden, ids, weights = (part[:SAMPLE_TOKENS] for part in (routed.states, routed.ids, routed.weights))
        pairs = hidden.repeat_interleave(ids.shape[1], dim=0)
        flat_ids, flat_weights = ids.reshape(-1, 1), weights.reshape(-1, 1)
        with torch.no_grad():
            expected = routed.experts(pairs, flat_ids, flat_weights).double()
            computed = mine(pairs, flat_ids, flat_weights).double()
        errors = (computed - expected).square().sum(-1)
        experts = mine.experts.experts
        total = torch.zeros(experts, dtype=torch.float64, device=errors.device)
        sums.expert_errors = total.index_add(0, flat_ids.flatten(), errors).cpu()
        sums.expert_tokens = torch.bincount(flat_ids.flatten(), minlength=experts).cpu()
        sums.expert_norm = _squares(expected.reshape(*ids.shape, -1).sum(1))

    def _compare(
        self, sums: LayerSums, int8: Tensor, base: Tensor, routed: Routed | None, base_routed: Routed | None
    ) -> None:
        mine, theirs = int8.double(), base.double()
        sums.difference += _squares(mine - theirs)
        sums.norm += _squares(mine)
        sums.baseline_norm += _squares(theirs)
        sums.product += (mine * theirs).sum().item()
        sums.tokens += mine.shape[0] * mine.shape[1]
        if routed is None or base_routed is None:
            return
        sums.routed = True
        same = routed.ids.sort(-1).values == base_routed.ids.sort(-1).values
        sums.changed += int((~same.all(-1)).sum())
        experts = max((m.experts.experts for m in self._modules.values() if isinstance(m, Int8Experts)), default=0)
        sums.load = torch.bincount(routed.ids.flatten(), minlength=experts).cpu()

    def _int8_modules(self, number: int, weights: LayerWeights) -> Iterator[tuple[str, nn.Module]]:
        """Path -> the module that computes in INT8 in its place."""
        if self._int8_layers is not None and number not in self._int8_layers:
            return
        skeleton = self.quantized.skeleton
        for path, names in weights.linears.items():
            module = skeleton.module(path)
            if not isinstance(module, nn.Linear):
                continue  # a router of a class of its own, say: engines keep those in float
            linear = _joined([weights.matrices[name] for name in names], module.weight)
            if linear is None:
                raise UnsupportedError(
                    "A linear of the model's class holds other rows than the checkpoint's int8 linears",
                    file=str(skeleton.root),
                    tensor=f"{path}.weight",
                )
            yield path, Int8Linear(linear.codes, linear.scale, module.bias, linear.input_scale)
        for path, (layer, experts) in weights.experts.items():
            activation = expert_activation(self._config, layer.index, layer.moe)
            if isinstance(activation, Unknown):
                raise UnsupportedError(
                    "These experts cannot run in INT8: what they compute is not known",
                    file=str(skeleton.root),
                    tensor=layer.prefix,
                    found=activation.reason,
                )
            if path not in skeleton.experts_of(number):
                raise UnsupportedError(
                    "The class of these experts cannot be replaced",
                    file=str(skeleton.root),
                    tensor=layer.prefix,
                    expected="routed experts in one module",
                    found=type(skeleton.layers[number]).__name__,
                )
            yield path, Int8Experts(experts, activation)

    @contextmanager
    def _int8(self, number: int) -> Iterator[None]:  # noqa: ARG002
        """The layer with its INT8 modules in place."""
        model, before = self.quantized.skeleton.model, {}
        for path, module in self._modules.items():
            before[path] = model.get_submodule(path)
            model.set_submodule(path, module)
        try:
            yield
        finally:
            for path, module in before.items():
                model.set_submodule(path, module)

    @contextmanager
    def _tap(self, model: Model, number: int) -> Iterator[list[Routed]]:
        """Collect what the routed experts of a layer are called with."""
        found: list[Routed] = []
        prefix = model.skeleton.layer_prefix(number)
        experts = model.skeleton.experts_of(number)
        replaced = [module for path, module in self._modules.items() if path.startswith(f"{prefix}.")]
        modules: list[nn.Module] = [module for module in replaced if isinstance(module, Int8Experts)]
        modules += experts.values()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            states, ids, weights = (values.get(key) for key in ("hidden_states", "top_k_index", "top_k_weights"))
            if isinstance(states, Tensor) and isinstance(ids, Tensor) and isinstance(weights, Tensor):
                tokens = states.reshape(-1, states.shape[-1])
                found.append(Routed(module, tokens, ids.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)))

        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _joined(parts: Sequence[Int8Weight], weight: Tensor) -> Int8Weight | None:
    """The int8 linears that make up one linear of the model, one after the other or row by row in turn.

    Args:
        parts: in the order of the checkpoint's names.
        weight: of the model's linear, [out, in], as it was filled.

    Returns:
        The linear whose dequantized weight is ``weight``; None where neither order gives it.
    """
    orders: list[tuple[Sequence[Int8Weight], bool]] = [(parts, False), (parts[::-1], False)]
    if len({part.codes.shape for part in parts}) == 1:
        orders += [(parts, True), (parts[::-1], True)]
    for order, in_turn in orders:
        join = (lambda tensors: torch.stack(tensors, 1).flatten(0, 1)) if in_turn else torch.cat
        codes, scale = join([part.codes for part in order]), join([part.scale for part in order])
        static = {None if part.input_scale is None else part.input_scale.item() for part in order}
        if codes.shape == weight.shape and len(static) == 1:
            expected = dequantized(codes, scale).to(weight.dtype)
            if torch.equal(expected, weight):
                return Int8Weight(codes, scale, order[0].input_scale)
    return None


def relative(difference: float, norm: float) -> float:
    """Relative error from two sums of squares."""
    return math.sqrt(difference / norm) if norm else (0.0 if difference == 0 else math.inf)


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum().item())
