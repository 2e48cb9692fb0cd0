"""Findings where parts of the model that config.json declares are not stored, or have another size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from quarkconv.description.parameters import layers_of
from quarkconv.experts.config import ModelConfig, stack_of
from quarkconv.experts.family import FamilyOf
from quarkconv.experts.layer import MoELayer
from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.scheme.form import Form
from quarkconv.scheme.resolved import Groups
from quarkconv.text import plural

_EMBEDDINGS: Final = ("embed_tokens", "word_embeddings", "tok_embeddings", "wte", "embed", "embeddings")
_HEADS: Final = frozenset({"lm_head", "head", "output", "output_layer", "embed_out", "proj_out"})
"""Last parts of the names of the embeddings, and of the head, of a language model."""
_SHARED_COUNTS: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED: Final = (*_SHARED_COUNTS, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
_NORM_BIASES: Final = tuple(f".{norm}_layernorm.bias" for norm in ("input", "post_attention"))
_BIASED_NORMS: Final = frozenset({"phimoe"})
"""Model types whose norms have biases."""
_ATTENTION: Final = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense", "q_a_proj", "q_b_proj", "kv_b_proj",
    "kv_a_proj_with_mqa",
})  # fmt: skip
_MLP: Final = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"})
"""Last parts of the names of linears of the attention, and of dense MLPs and shared experts."""
_WITH_BIASES: Final = {
    _ATTENTION: ("attention_bias", "qkv_bias", "use_qkv_bias", "attention_qkv_bias", "use_bias", "add_bias_linear"),
    _MLP: ("mlp_bias", "use_bias", "add_bias_linear"),
}
"""Linears -> the settings by which they have biases."""
_BIASED_ATTENTION: Final = frozenset({"gpt_oss", "qwen2_moe"})
"""Model types whose attention has biases where no setting says so."""
_HINT: Final = "engines build the model from config.json and leave missing weights uninitialized: export it again"


def missing_parts(
    config: ModelConfig, layers: tuple[MoELayer, ...], others: Groups, is_mtp: Callable[[str], bool]
) -> Iterator[Finding]:
    """The findings about embeddings, head, attention and shared experts of the language model.

    Args:
        config: the config of the model.
        layers: the MoE layers.
        others: the modules that are not routed experts.
        is_mtp: a test of names, see :func:`quarkconv.description.mtp.mtp_test`.
    """
    own = [layer for layer in layers if config.part_of(layer.moe) is config.text and not is_mtp(layer.moe)]
    if not own:
        return
    modules = {name: form for (form, _), names in others.items() for name in names if not stack_of(name)}
    yield from _embeddings(config, {name: form for name, form in modules.items() if not is_mtp(name)})
    blocks = {layer.moe: f"{layer.moe.rpartition('.')[0]}." for layer in own}
    inside: dict[str, list[str]] = {block: [] for block in blocks.values()}
    depth = {block.count(".") for block in inside}
    for name in modules:
        parts = name.split(".")
        for dots in depth:
            block = "".join(f"{part}." for part in parts[:dots])
            if block in inside:
                inside[block].append(name)
    beside = {moe: [name for name in inside[block] if not name.startswith(f"{moe}.")] for moe, block in blocks.items()}
    bare = [moe for moe, names in beside.items() if not any("share" not in name for name in names)]
    if len(bare) < len(own):
        yield from FindingsAbout(
            "config-mismatch",
            bare,
            f"{plural(len(bare), 'MoE layer')} without attention linears, which the others have",
            hint=_HINT,
        )
    yield from _incomplete(modules)
    shared = [key for key in _SHARED if type(value := config.text.get(key)) is int and value > 0]
    if shared:
        without = [moe for moe, block in blocks.items() if not any("share" in name for name in inside[block])]
        yield from FindingsAbout(
            "config-mismatch",
            without,
            f"config.json declares shared experts ({shared[0]}), but {plural(len(without), 'MoE layer')} store none",
            hint=_HINT,
        )


def shared_among_routed(
    findings: Iterable[Finding], config: ModelConfig, layers: tuple[MoELayer, ...], others: Groups
) -> Iterator[Finding]:
    """The findings about experts; a layer of as many more as there are shared experts, stored nowhere else, has those.

    SGLang holds the shared expert of DeepSeek V3 and others as expert E of E in memory
    (``num_fused_shared_experts`` of 0.5.23), and what is saved from there has its names.

    Args:
        findings: about the MoE layers.
        config: the config of the model.
        layers: the MoE layers.
        others: the modules that are not routed experts.
    """
    stored = {layer.prefix: layer for layer in layers}
    shared = {value for key in _SHARED_COUNTS if type(value := config.text.get(key)) is int and value > 0}
    for item in findings:
        layer = stored.get(item.subject) if item.code == "expert-count" else None
        claimed = None if layer is None else config.local_experts_of(layer.prefix, layer.quantized)
        if layer is None or claimed is None or layer.experts - claimed not in shared:
            yield item
            continue
        block = f"{layer.moe.rpartition('.')[0]}."
        if any("share" in name for names in others.values() for name in names if name.startswith(block)):
            yield item
            continue
        yield finding(
            "shared-among-routed",
            layer.prefix,
            f"The layer stores {layer.experts} experts; config.json has {claimed} routed ones, and as many shared ones "
            "as follow them",
            hint="give a checkpoint whose shared experts have their own names, as in the published one",
        )


def norm_biases(config: ModelConfig, layers: tuple[MoELayer, ...], biases: Iterable[str]) -> Iterator[Finding]:
    """The finding about biases of norms in the decoder layers, which root mean square norms do not have.

    msModelSlim writes them where it moves outliers with ``anti_method`` m4; vllm-ascend adds them (``layernorm.py``).

    Args:
        config: the config of the model.
        layers: the MoE layers.
        biases: names of all biases.
    """
    if config.model_type in _BIASED_NORMS:
        return
    blocks = tuple({f"{layer.moe.rpartition('.')[0]}." for layer in layers})
    names = sorted(name for name in biases if name.endswith(_NORM_BIASES) and name.startswith(blocks))
    yield from FindingsAbout(
        "norm-biases",
        names,
        f"{plural(len(names), 'bias', 'biases')} of norms, which models of this type do not have",
        hint="vllm-ascend adds them; other engines drop them or fail: quantize again without shifting outliers",
    )


def linear_biases(
    config: ModelConfig, layers: tuple[MoELayer, ...], biases: Iterable[str], family: FamilyOf
) -> Iterator[Finding]:
    """The finding about biases of linears in the decoder layers, which config.json does not declare.

    vLLM 0.33 drops such biases without an error (``ignore_unexpected_suffixes`` of ``AutoWeightsLoader``). Those of
    routed experts and routers belong to the function of these.

    Args:
        config: the config of the model.
        layers: the MoE layers.
        biases: names of all biases.
        family: gives the family of models that a module belongs to; None where it is unknown.
    """
    own = [layer for layer in layers if config.part_of(layer.moe) is config.text and family(layer.moe) is not None]
    if not own:
        return
    stacks = tuple({f"{stack}." for layer in own if (stack := layers_of(layer.moe)) is not None})
    absent = frozenset[str]().union(
        *(
            leaves
            for leaves, keys in _WITH_BIASES.items()
            if not any(part.get(key) for part in (config.raw, config.text) for key in keys)
            and not (leaves is _ATTENTION and config.model_type in _BIASED_ATTENTION)
        )
    )
    modules = ((name, name.removesuffix(".bias").rpartition(".")) for name in biases if name.startswith(stacks))
    names = sorted(name for name, (parent, _, leaf) in modules if leaf in absent and ".experts" not in parent)
    yield from FindingsAbout(
        "linear-biases",
        names,
        f"{plural(len(names), 'bias', 'biases')} of linears that models of this type and config.json do not have",
        hint="vLLM drops them without an error: use the config.json of the model that was quantized, or quantize again",
    )


def _incomplete(modules: Mapping[str, Form]) -> Iterator[Finding]:
    """The finding about MLPs, dense or of shared experts, of which ``up_proj`` or ``down_proj`` alone is stored."""
    ends = (".up_proj", ".down_proj")
    others = [name for name in modules if ".experts." not in name]  # those have findings of their own
    parts = {end: {name.removesuffix(end) for name in others if name.endswith(end)} for end in ends}
    lost = [f"{mlp}{ends[1]}" for mlp in parts[ends[0]] - parts[ends[1]]]
    lost += [f"{mlp}{ends[0]}" for mlp in parts[ends[1]] - parts[ends[0]] if f"{mlp}.gate_up_proj" not in modules]
    yield from FindingsAbout(
        "config-mismatch",
        sorted(lost),
        f"{plural(len(lost), 'MLP')} with a missing projection",
        hint=_HINT,
    )


def _embeddings(config: ModelConfig, modules: dict[str, Form]) -> Iterator[Finding]:
    """The findings about embeddings and head."""
    rows = config.text.get("vocab_size", config.raw.get("vocab_size"))
    embeddings = [name for name in modules if name.rpartition(".")[2] in _EMBEDDINGS]
    if not embeddings and type(rows) is int:
        yield finding("config-mismatch", "config.json", "No embeddings of the language model are stored", hint=_HINT)
    other = [name for name in embeddings if type(rows) is int and modules[name].weight.shape[0] != rows]
    if other:
        found = modules[other[0]].weight.shape[0]
        yield from FindingsAbout(
            "config-mismatch",
            other,
            f"config.json has vocab_size {rows}, but the embeddings have {found} rows",
            hint=_HINT,
        )
    width = config.text.get("hidden_size", config.raw.get("hidden_size"))
    wide = [name for name in embeddings if type(width) is int and modules[name].weight.shape[1:] != (width,)]
    if wide:
        shape = list(modules[wide[0]].weight.shape)
        yield from FindingsAbout(
            "config-mismatch", wide, f"config.json has hidden_size {width}, the embeddings are {shape}", hint=_HINT
        )
    tied = [part["tie_word_embeddings"] for part in (config.raw, config.text) if "tie_word_embeddings" in part]
    if tied and not any(tied) and not any(name.rpartition(".")[2] in _HEADS for name in modules):
        yield finding(
            "config-mismatch",
            "config.json",
            "config.json has tie_word_embeddings = false, but no head of the language model is stored",
            hint=_HINT,
        )
