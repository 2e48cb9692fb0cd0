"""All tensors of an output: the int8 modules as a target writes them, every other tensor as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from quarkconv.description.description import Description
from quarkconv.description.expert_names import identity_tensors
from quarkconv.dtypes import QUANTIZABLE
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import knowledge_by_stack, layer_routing
from quarkconv.experts.ranks import Rank
from quarkconv.experts.router_tensors import router_tensor_names
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.experts import ExpertSource, dequantized, fp8_tensors, linear_module, zero_checks
from quarkconv.plan.pieces import Check, Copy, OutputTensor
from quarkconv.scheme.form import linear_names
from quarkconv.targets.base import Target


def output_tensors(description: Description, target: Target, rank: Rank) -> tuple[list[OutputTensor], list[Check]]:
    """The tensors of an output, unsorted, and the conditions on the source's data under which they are exact.

    Tensors that only a check reads, such as zero points, are not written.

    Args:
        description: the source, which can be converted to ``target``.
        target: the format of the output.
        rank: the rank whose part of the experts is written.
    """
    identities = identity_tensors(description.moe_layers, description.checkpoint.types)
    left_out = {*target.dropped(description), *identities}
    renamed = {scale: target.renamed(scale) for scale in description.stored.output_scales}
    refs = description.checkpoint.refs()
    tensors: list[OutputTensor] = []
    checks = [*zero_checks(description.modules, description.stored.fused, refs), *_finite_checks(description, refs)]
    for layer in description.int8_layers:
        source = ExpertSource(layer, refs, description.unfused_layout(layer), rank, description.engine_naming)
        if not rank.is_whole:
            left_out.update(*(layer.projection(role, at).names for role, at, _ in layer.modules()))
        tensors += target.expert_tensors(source)
        checks += target.expert_checks(source)
    in_float = frozenset(target.float_modules(description))
    for name, form in description.stored.linears.items():
        if not form.quantized or (name in description.topology.members and name not in description.topology.unread):
            continue
        module = linear_module(name, form, refs)
        if name in in_float:
            names = linear_names(name)
            tensors.append(dequantized(module))
            left_out.update((names.input_scale, names.input_zero_point))
            continue
        tensors += target.module_tensors(module)
        checks += target.module_checks(module)
    for group in description.fp8:
        for name in group.modules:
            tensors += fp8_tensors(name, description.stored.linears[name], group.strategy, refs)
    read = (source for tensor in tensors for piece in tensor.pieces for source in piece.reads())
    checked = (source for check in checks if check.kind != "finite" for source in check.reads())
    left_out.update(source.tensor for source in chain(read, checked))
    for name, ref in refs.items():
        if name not in left_out:
            tensors.append(OutputTensor(renamed.get(name, name), ref.dtype, ref.shape, (Copy.whole(name, ref),)))
    return tensors, checks


def _finite_checks(description: Description, refs: Mapping[str, TensorRef]) -> Iterator[Check]:
    """The condition that routers, and biases of experts, are finite, without which a layer computes nothing.

    Other tensors in float may hold infinities, such as those of a mask.
    """
    known_of = knowledge_by_stack(description.config.raw)
    for layer in description.moe_layers:
        routing = layer_routing(known_of(layer.moe), layer)
        if isinstance(routing, Unknown):
            names: list[str | None] = []
        else:
            names = [*router_tensor_names(routing, layer.router_module, refs.__contains__)]
        if layer.biased:
            modules = (layer.projection(role, at).names.weight for role, at, _ in layer.modules())
            names += [f"{name.removesuffix('.weight')}.bias" for name in modules]
        for name in names:
            if name is not None and name in refs and refs[name].dtype in QUANTIZABLE:
                yield Check("finite", Copy.whole(name, refs[name]), dtype=refs[name].dtype)
